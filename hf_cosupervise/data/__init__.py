"""What a column holds, and how a cell becomes what a model reads."""
