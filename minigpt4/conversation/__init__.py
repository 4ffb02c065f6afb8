"""One template object and one encoder for training and chat."""
