"""Query features on disk: what `python -m minigpt4 cache` writes once, and training reads in place of images.

Features are stored under the hash of the content of their image file. So they do not depend on the data set that names
the image, on its text, or on the language model; and an image that has changed is not found.
"""
