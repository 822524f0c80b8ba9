"""The starter model: what it is taught (`corpus`) and how it is made (`steps`, `train.py`)."""
