"""Published models: versions under a name, kept by the cluster instead of by a driver.

catalog ── decides what is current, and holds no block (an actor; `manifest` is its memory)
owner ──── owns the blocks that its tasks make, so that Ray makes them again (an actor)
publication, follower ── the caller's side: publish, load; and a model that changes by itself
"""
