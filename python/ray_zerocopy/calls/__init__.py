"""Models in tasks: find and replace them in a pipeline, and cache them in workers.

In: a pipeline, a reference. Out: the pipeline with its models replaced; a model that a worker loads
once. Imports `store` and what that may import.
"""
