"""What a model is asked: one class for each task, from the layout of a data set to questions."""
