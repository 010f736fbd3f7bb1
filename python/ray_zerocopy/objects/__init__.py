"""Split an object into skeleton and tensors for the store, and join it again over a block.

In: any picklable object graph. Out: a pickle without the bytes of tensors, and their sources.
Uses torch, numpy and pickle, never Ray's store. Imports `errors`, `pickled` and the Rust core.
"""
