"""Run batches of columns through a model, for Ray Data and Ray Serve.

In: a batch, as columns, a DataFrame, a Table or JSON. Out: columns of the model's output. Imports
`wrappers` and what that may import.
"""
