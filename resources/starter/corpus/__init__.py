"""What the starter model is taught: questions and answers about Weft, and how they are varied."""
