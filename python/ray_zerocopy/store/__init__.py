"""One block in Ray's store: put, get, inspect, build, save, restore.

In: an object, a loader or a file. Out: an `ObjectRef`, and from it the object over its block.
Only `ray_inside` uses private parts of Ray. Imports `objects` and what that may import.
"""
