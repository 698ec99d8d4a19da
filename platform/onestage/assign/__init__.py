"""Which prediction answers for which truth."""
