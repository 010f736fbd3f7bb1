"""An object as skeleton and tensors: split for the store, joined again over a block.

In: any picklable object graph. Out: a pickle without the bytes of tensors, and where these lie.
Knows torch, numpy and pickle, never Ray's store. Imports `errors`, `pickled` and the Rust core.
"""
