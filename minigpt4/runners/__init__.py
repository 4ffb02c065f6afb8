"""One class per job: training and evaluation, selected by `run.runner`, and captioning of a folder."""
