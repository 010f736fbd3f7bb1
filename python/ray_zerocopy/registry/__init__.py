"""Published models: versions under a name, kept by the cluster instead of by a driver.

catalog ── decides which version is current, holds no block (an actor; its state: `manifest`)
owner ──── owns the blocks that its tasks make, so that Ray can rebuild them (an actor)
publication, follower ── the caller's side: publish and load; a model that updates itself
"""
