"""Kill the catalog, or fail its writes, at each step of each change.

    python tests/chaos/steps.py [CHANGE ...]

A change takes steps that other processes see: writes, and messages to the owner. For each step the
change starts anew. The catalog dies before or after the step, or the write fails before or after it
is done. The caller does not retry, because it may have died, too. Then each name is as before the
change or as after it, every live version loads, and a caller that was told "done" was told the
truth. When the change is requested again, it completes.
"""

import itertools
import os
import sys
import time
import uuid
from dataclasses import replace
from pathlib import Path

import ray
import ray_zerocopy as rzc
import rays
from fresh import tell

sys.path.insert(0, str(Path(__file__).parent))
import promises
from promises import FOLDER, SOON_S, actor, filled, generations, until, value_of
from ray_zerocopy.registry.catalog import LEASE_S, Wanted
from ray_zerocopy.registry.owner import Draft, Made
from ray_zerocopy.registry.records import Plan
from ray_zerocopy.store.envelope import Anchored, Parts

SIZE = 300  # 360 kB: in the store

ray.cloudpickle.register_pickle_by_value(promises)  # workers cannot import from this folder


# --- the catalog at a step ------------------------------------------------------------------------


def fail_at(catalog, at, how):
    """Make the catalog die at a step, or fail its write. Runs in the catalog."""
    catalog.steps = 0

    def step(may_fail):
        if how == "fails" and not may_fail:
            return
        catalog.steps += 1
        if catalog.steps == at:
            if how == "dies":
                time.sleep(0.2)  # lets messages leave
                os._exit(1)
            if may_fail:
                raise ConnectionError("the GCS is gone, for a moment")

    class Method:
        def __init__(self, method):
            self.method = method

        def remote(self, *args):
            step(may_fail=False)
            sent = self.method.remote(*args)
            step(may_fail=False)
            return sent

    class OwnerAtAStep:
        def __getattr__(self, name):
            method = getattr(owner, name)
            return method if name in ("watch", "held") else Method(method)

    owner = catalog._owner
    catalog._owner = catalog._healing._owner = OwnerAtAStep()
    kept = catalog._manifest._kept
    put = kept.put

    def put_at_a_step(key, value):
        step(may_fail=True)
        put(key, value)
        step(may_fail=True)

    kept.put = put_at_a_step


def steps_taken(catalog):
    """Count the steps, and remove the faults. Runs in the catalog, if it is alive."""
    vars(catalog._manifest._kept).pop("put", None)
    taken = getattr(catalog, "steps", 0)
    catalog.steps = float("-inf")
    return taken


def told(method, *args):
    """Ask the catalog once. Returns its answer or error."""
    try:
        return ray.get(getattr(actor("catalog"), method).remote(*args), timeout=SOON_S)
    except (ray.exceptions.RayError, rzc.RayZeroCopyError) as error:
        return error


# --- the changes ----------------------------------------------------------------------------------


class Change:
    """A change of a name. `values` are those of its versions before and after."""

    def __init__(self, name):
        self.name = name

    def prepare(self):
        for value in (1, 2):
            rzc.publish(self.name, filled(value, SIZE), keep=2)

    def begin(self):
        raise NotImplementedError

    def again(self):
        raise NotImplementedError

    def current(self, done):
        """The value of the name's current version; None without one."""
        return 3 if done else 2

    def live(self, done):
        return {2, 3} if done else {1, 2}


class PublishAnObject(Change):
    """Publishes an object that its publisher writes."""

    def begin(self):
        shared = Anchored(filled(3, SIZE))
        parts = Parts.of(shared)
        draft = Draft(parts.skeleton, parts.buffers, parts.table, shared.block.nbytes)
        plan = Plan("object", ray.get_runtime_context().get_node_id())
        wanted = Wanted(self.name, uuid.uuid4().hex, plan, 2, None, draft)
        room = told("publish", wanted, [], SOON_S)
        if not isinstance(room, Made):
            return room
        digest = rzc.store.references.write(shared, room.ref, room.nbytes).digest()
        how = {"digest": digest, "written": (room.ref,)}
        answer = told("publish", replace(wanted, **how), [], SOON_S)
        return RuntimeError("to be written again") if isinstance(answer, Made) else answer

    def again(self):
        rzc.publish(self.name, filled(3, SIZE), keep=2)


class CopyAnObject(PublishAnObject):
    def begin(self):
        node = ray.get_runtime_context().get_node_id()
        ref, plan = rzc.put(filled(3, SIZE)), Plan("object", node)
        digest = rzc.store.references.parts_of(ref).digest()
        return told("publish", Wanted(self.name, uuid.uuid4().hex, plan, 2, digest), [ref], SOON_S)


class PublishAMake(Change):
    def begin(self):
        make = ray.cloudpickle.dumps(lambda: filled(3, SIZE))
        plan = Plan("make", ray.get_runtime_context().get_node_id(), make=make)
        return told("publish", Wanted(self.name, uuid.uuid4().hex, plan, 2, None), [], SOON_S)

    def again(self):
        rzc.publish(self.name, make=lambda: filled(3, SIZE), keep=2)


class PublishWhatIsCurrent(PublishAMake):
    """It heals afterwards."""

    def begin(self):
        make = ray.cloudpickle.dumps(lambda: filled(2, SIZE))
        plan = Plan("make", ray.get_runtime_context().get_node_id(), make=make)
        return told("publish", Wanted(self.name, uuid.uuid4().hex, plan, 2, None), [], SOON_S)

    def again(self):
        assert rzc.publish(self.name, make=lambda: filled(2, SIZE), keep=2).heals

    def current(self, done):
        return 2

    def live(self, done):
        return {1, 2}


class Supersede(PublishAMake):
    """This name overwrites the file that another name heals from. First the other stops healing."""

    def prepare(self):
        super().prepare()
        self.file = str(FOLDER / f"{uuid.uuid4().hex}.rzc")
        self.other = f"{self.name}-other"
        rzc.publish(self.other, filled(9, SIZE), snapshot=self.file)

    def begin(self):
        saved = f"{self.file}.saved"
        rzc.save(filled(3, SIZE), saved)
        node = ray.get_runtime_context().get_node_id()
        plan = Plan("object", node, files=(saved, self.file))
        return told("publish", Wanted(self.name, uuid.uuid4().hex, plan, 2, None), [], SOON_S)

    def again(self):
        rzc.publish(self.name, filled(3, SIZE), snapshot=self.file, keep=2)

    def live(self, done):
        (other,) = rzc.versions(self.other)[-1:]
        assert not (done and other.heals)
        assert value_of(rzc.load(self.other, timeout=SOON_S)) == 9
        return super().live(done)


class Promote(Change):
    def begin(self):
        return told("promote", self.name, self.number(1))

    def number(self, value):
        live = generations(self.name)
        return min(live) if value == 1 else max(live)

    def again(self):
        rzc.promote(self.name, self.number(1))

    def current(self, done):
        return 1 if done else 2

    def live(self, done):
        return {1, 2}


class Retire(Promote):
    def begin(self):
        return told("retire", self.name, self.number(1))

    def again(self):
        if len(generations(self.name)) == 2:
            rzc.retire(self.name, self.number(1))

    def current(self, done):
        return 2

    def live(self, done):
        return {2} if done else {1, 2}


class RetireAName(Change):
    def begin(self):
        return told("retire", self.name, None)

    def again(self):
        if self.name in rzc.published():
            rzc.retire(self.name)

    def current(self, done):
        return None if done else 2

    def live(self, done):
        return set() if done else {1, 2}


class MakeAgain(Change):
    """Somebody reports the block of a healing version as lost."""

    def prepare(self):
        rzc.publish(self.name, make=lambda: filled(1, SIZE), keep=2)

    def begin(self):
        version = rzc.versions(self.name)[-1]
        actor("catalog").__ray_call__.remote(lose, self.name)
        return told("find", self.name, version.number, SOON_S)

    def again(self):
        actor("catalog").__ray_call__.remote(lose, self.name)
        rzc.load(self.name, timeout=SOON_S)

    def current(self, done):
        return 1

    def live(self, done):
        return {1}


def lose(catalog, name):
    """Make the catalog believe that it has no block of a name. Runs in the catalog."""
    record = catalog._manifest.record(name)
    catalog._healing._blocks.pop(record.kept[record.number].block, None)


CHANGES = {
    "an_object_is_published": PublishAnObject,
    "an_object_is_copied": CopyAnObject,
    "what_is_made_is_published": PublishAMake,
    "what_is_current_heals": PublishWhatIsCurrent,
    "a_file_is_superseded": Supersede,
    "a_version_is_promoted": Promote,
    "a_version_is_retired": Retire,
    "a_name_is_retired": RetireAName,
    "a_block_is_made_again": MakeAgain,
}
SHORT = {  # the suite runs only these, in a minute
    "an_object_is_published": ("dies",),
    "a_version_is_retired": ("fails",),
}


# --- the law --------------------------------------------------------------------------------------


def stands(change, done):
    """Assert that a name is as before the change or as after it; if told, as told."""
    live = {
        number: value_of(rzc.load(change.name, version=number, timeout=SOON_S))
        for number in generations(change.name)
    }
    current = [v.number for v in rzc.versions(change.name) if v.current]
    value = live[current[0]] if current else None
    if current:
        assert value_of(rzc.load(change.name, timeout=SOON_S)) == value
    found = [
        each
        for each in (False, True)
        if value == change.current(each) and set(live.values()) == change.live(each)
    ]
    assert found, (live, value)
    assert done is None or done in found, (done, live, value)


def held():
    """The owner holds exactly the live versions."""
    _, tokens = ray.get(actor("owner").held.remote(), timeout=SOON_S)
    blocks = ray.get(actor("catalog").__ray_call__.remote(lambda it: it._healing._live_blocks()))
    return set(tokens) == blocks


def row(kind, ways=("dies", "fails")):
    def at_each_step():
        for how in ways:
            for at in itertools.count(1):
                change = kind(f"{kind.__name__}/{how}/{at}")
                change.prepare()
                ray.get(actor("catalog").__ray_call__.remote(fail_at, at, how))
                answer = change.begin()
                failed = isinstance(answer, Exception)
                until(lambda: isinstance(told("names"), list))
                taken = ray.get(actor("catalog").__ray_call__.remote(steps_taken))
                over = not failed and taken < at
                if how == "fails":
                    stands(change, done=not failed)
                    os.kill(ray.get(actor("catalog").__ray_call__.remote(lambda _: os.getpid())), 9)
                    until(lambda: isinstance(told("names"), list))
                    stands(change, done=not failed)
                else:
                    stands(change, done=None if failed else True)
                change.again()
                stands(change, done=True)
                print(change.name, type(answer).__name__, taken, over, file=sys.stderr)
                for name in {change.name, getattr(change, "other", change.name)}:
                    if name in rzc.published():
                        rzc.retire(name)
                if over:
                    break
            assert at > 1, "no step was taken"
        until(held, LEASE_S + SOON_S)

    return at_each_step


def main(names):
    rays.connect(num_cpus=2, object_store_memory=300 << 20)
    rzc.publish("first", filled(1))
    if names == ["short"]:
        tell({name: row(CHANGES[name], ways) for name, ways in SHORT.items()}, SHORT)
    else:
        for name in names or CHANGES:
            row(CHANGES[name])()
    ray.shutdown()


if __name__ == "__main__":
    main(sys.argv[1:])
