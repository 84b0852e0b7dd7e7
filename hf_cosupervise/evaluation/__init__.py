"""What is compared, how, and how it is told."""
