"""From answers to statistics: one function for each rule, from the rows of an answer file."""
