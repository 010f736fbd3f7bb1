"""Published models: versions under a name, kept by the cluster instead of by a driver.

catalog ── decides which version is current, and holds no block (an actor; `manifest` stores it)
owner ──── owns the blocks that its tasks make, so that Ray can rebuild them (an actor)
publication, follower ── the caller's side: publish and load; a model that updates itself
"""
