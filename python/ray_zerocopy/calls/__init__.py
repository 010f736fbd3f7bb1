"""Models called in tasks: found in a pipeline and replaced, kept by the worker that runs them.

In: a pipeline, a reference. Out: the pipeline with other things where its models were; a model that
a worker loads once. Imports `store` and what that may import.
"""
