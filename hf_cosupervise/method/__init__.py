"""The method as pure functions on tensors."""
