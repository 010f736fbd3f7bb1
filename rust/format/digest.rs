//! The digest: equal objects have the same one, whichever process pickled them.
//!
//! ```text
//! skeleton ─ read ─▶ graph ─ forget ─▶ graph ─ walk ─▶ words ─ XXH3 ─▶ digest
//! ```
//!
//! The skeletons of equal objects differ between processes. Pickle writes a set of strings in the
//! order of the process's hash seed. It writes an interned string once. Some numbers only count
//! what the process did before. So `read` builds the graph of the objects in the pickle, `forget`
//! drops everything that is specific to the process, and `walk` writes the graph in one fixed
//! order.
//!
//! A value (a number, a string, a tuple of values) counts by its content. For any other object, it
//! also counts which objects refer to it. A tensor counts as its view and the checksum of its span,
//! so no weight is read. The order of a dict counts, because it decides the order of a model's
//! layers.

use std::collections::{HashMap, HashSet};

use twox_hash::XxHash3_128;

use crate::error::{Error, Result};
use crate::format::table::Table;

/// How many references away from an object `colours` looks at most, to order sets of objects.
const ROUNDS: usize = 64;

/// The first bytes of a ZIP archive, such as torch's programs.
const ARCHIVE: &[u8] = b"PK\x03\x04";

/// The kind of an object.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    None,
    Bool,
    Int,
    Float,
    Str,
    Bytes,
    /// A class or function, by module and name.
    Global,
    Tuple,
    FrozenSet,
    List,
    Dict,
    Set,
    ByteArray,
    Tensor,
    Buffer,
    ReadOnlyBuffer,
    /// The result of a call.
    Call,
    /// An instance that its class made without `__init__`.
    New,
    /// An object without content, only distinct from others.
    Name,
}

/// The part that an object plays in the object that refers to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Role {
    Part,
    Item,
    Key,
    Value,
    /// A member of a set: the order does not count.
    Member,
    State,
    /// A call that changed the object.
    Change,
}

/// An object of the graph.
#[derive(Debug, Clone)]
struct Node<'a> {
    kind: Kind,
    /// The bytes of a string or an integer, as in the pickle.
    bytes: &'a [u8],
    /// The hash of the object without the objects that it refers to.
    own: u128,
    /// The hash of a value; `None` if it counts which objects refer to this one.
    value: Option<u128>,
    edges: Vec<(Role, usize)>,
}

/// The digest of an object, from its skeleton, its table, the views that are buffers, and the
/// checksums of its spans. `plain` takes an archive found among its `bytes`, and returns the part
/// that counts. Refuses a skeleton that is not a pickle.
pub fn digest(
    skeleton: &[u8],
    table: &Table,
    buffers: &[u32],
    sums: &[u64],
    plain: &dyn Fn(&[u8]) -> Vec<u8>,
) -> Result<u128> {
    let mut graph = Graph::read(skeleton, table, buffers, sums, plain)?;
    graph.forget();
    Ok(graph.walk())
}

/// Hashes the bytes of an object of this kind.
fn hash(kind: Kind, bytes: &[u8]) -> u128 {
    XxHash3_128::oneshot_with_seed(kind as u64, bytes)
}

/// A number of at most 8 bytes, little-endian.
fn number(bytes: &[u8]) -> Result<usize> {
    let mut word = [0; 8];
    word.get_mut(..bytes.len()).ok_or(DAMAGED)?.copy_from_slice(bytes);
    usize::try_from(u64::from_le_bytes(word)).map_err(|_| DAMAGED)
}

struct Graph<'a> {
    nodes: Vec<Node<'a>>,
    root: usize,
    /// The span of each node that is a tensor or a buffer.
    spans: HashMap<usize, usize>,
}

// --- read: a pickle machine that makes no objects
// -------------------------------------------------

struct Reader<'a, 'p> {
    rest: &'a [u8],
    plain: &'p dyn Fn(&[u8]) -> Vec<u8>,
    nodes: Vec<Node<'a>>,
    stack: Vec<usize>,
    marks: Vec<usize>,
    memo: Vec<usize>,
}

const DAMAGED: Error = Error::Corrupt { what: "the skeleton" };

impl<'a> Graph<'a> {
    fn read(
        skeleton: &'a [u8],
        table: &Table,
        buffers: &[u32],
        sums: &[u64],
        plain: &dyn Fn(&[u8]) -> Vec<u8>,
    ) -> Result<Graph<'a>> {
        let (nodes, stack, marks, memo) = (vec![], vec![], vec![], vec![]);
        let mut reader = Reader { rest: skeleton, plain, nodes, stack, marks, memo };
        let mut views: HashMap<usize, usize> = HashMap::new(); // the node of each tensor
        let mut spans = HashMap::new();
        let mut buffers = buffers.iter().map(|&view| view as usize);
        loop {
            let (kind, view) = match reader.step()? {
                Step::Next => continue,
                Step::Stop => break,
                Step::Tensor(view) => (Kind::Tensor, view),
                Step::Buffer => (Kind::Buffer, buffers.next().ok_or(DAMAGED)?),
            };
            if let Some(&node) = views.get(&view) {
                reader.stack.push(node);
                continue;
            }
            let known = table.views.get(view).ok_or(DAMAGED)?;
            let span = table.spans.get(known.span).ok_or(DAMAGED)?;
            let sum = sums.get(known.span).ok_or(DAMAGED)?;
            let numbers = [u64::from(known.flags.0), known.offset, span.nbytes, *sum];
            let numbers = numbers.iter().chain(&known.shape).chain(&known.stride);
            let mut words = vec![known.dtype as u8];
            words.extend(numbers.flat_map(|number| number.to_le_bytes()));
            let node = reader.push(kind, &words, false);
            views.insert(view, node);
            spans.insert(node, known.span);
        }
        let root = reader.pop()?;
        Ok(Graph { nodes: reader.nodes, root, spans })
    }
}

enum Step {
    Next,
    Stop,
    Tensor(usize),
    Buffer,
}

impl<'a> Reader<'a, '_> {
    /// Executes one instruction.
    fn step(&mut self) -> Result<Step> {
        match self.take(1)?[0] {
            b'.' => return Ok(Step::Stop),
            b'Q' => {
                let index = self.pop()?;
                return Ok(Step::Tensor(number(self.nodes[index].bytes)?));
            }
            b'\x97' => return Ok(Step::Buffer),
            b'\x80' => drop(self.take(1)?), // the protocol
            b'\x95' => drop(self.take(8)?), // a frame
            b'(' => self.marks.push(self.stack.len()),
            b'0' => self.forgo()?,
            b'1' => drop(self.popped()?),
            b'2' => self.stack.push(self.top()?),
            // values
            b'N' => drop(self.push(Kind::None, &[], true)),
            b'\x88' => drop(self.push(Kind::Bool, &[1], true)),
            b'\x89' => drop(self.push(Kind::Bool, &[0], true)),
            b'K' => self.int(1, false)?,
            b'M' => self.int(2, false)?,
            b'J' => self.int(4, true)?,
            b'\x8a' => {
                let nbytes = self.number(1)?;
                self.int(nbytes, true)?;
            }
            b'\x8b' => {
                let nbytes = self.number(4)?;
                self.int(nbytes, true)?;
            }
            b'G' => {
                let bytes = self.take(8)?;
                self.push(Kind::Float, bytes, true);
            }
            b'\x8c' => self.text(Kind::Str, 1)?,
            b'X' => self.text(Kind::Str, 4)?,
            b'\x8d' => self.text(Kind::Str, 8)?,
            b'C' => self.text(Kind::Bytes, 1)?,
            b'B' => self.text(Kind::Bytes, 4)?,
            b'\x8e' => self.text(Kind::Bytes, 8)?,
            b'\x96' => {
                let nbytes = self.number(8)?;
                let bytes = self.take(nbytes)?;
                self.push(Kind::ByteArray, bytes, false);
            }
            b'\x93' => {
                let parts = self.last(2)?;
                self.compound(Kind::Global, Role::Part, parts);
            }
            // containers
            b')' => self.compound(Kind::Tuple, Role::Part, vec![]),
            b'\x85' => self.tuple(1)?,
            b'\x86' => self.tuple(2)?,
            b'\x87' => self.tuple(3)?,
            b't' => {
                let parts = self.popped()?;
                self.compound(Kind::Tuple, Role::Part, parts);
            }
            b'\x91' => {
                let parts = self.popped()?;
                self.compound(Kind::FrozenSet, Role::Member, parts);
            }
            b']' => drop(self.push(Kind::List, &[], false)),
            b'}' => drop(self.push(Kind::Dict, &[], false)),
            b'\x8f' => drop(self.push(Kind::Set, &[], false)),
            b'a' => {
                let item = self.pop()?;
                self.hold(&[Role::Item], vec![item])?;
            }
            b'e' => {
                let items = self.popped()?;
                self.hold(&[Role::Item], items)?;
            }
            b's' => {
                let pair = self.last(2)?;
                self.hold(&[Role::Key, Role::Value], pair)?;
            }
            b'u' => {
                let pairs = self.popped()?;
                self.hold(&[Role::Key, Role::Value], pairs)?;
            }
            b'\x90' => {
                let members = self.popped()?;
                self.hold(&[Role::Member], members)?;
            }
            // objects that Python code makes
            b'\x98' => self.made(Kind::ReadOnlyBuffer, 1)?,
            b'R' => self.made(Kind::Call, 2)?,
            b'\x81' => self.made(Kind::New, 2)?,
            b'\x92' => self.made(Kind::New, 3)?,
            b'b' => {
                let state = self.pop()?;
                self.hold(&[Role::State], vec![state])?;
            }
            // the memo
            b'\x94' => self.memo.push(self.top()?),
            b'h' => {
                let index = self.number(1)?;
                self.again(index)?;
            }
            b'j' => {
                let index = self.number(4)?;
                self.again(index)?;
            }
            _ => return Err(DAMAGED),
        }
        Ok(Step::Next)
    }

    fn take(&mut self, nbytes: usize) -> Result<&'a [u8]> {
        let (taken, rest) = self.rest.split_at_checked(nbytes).ok_or(DAMAGED)?;
        self.rest = rest;
        Ok(taken)
    }

    /// A little-endian number of `nbytes` bytes.
    fn number(&mut self, nbytes: usize) -> Result<usize> {
        number(self.take(nbytes)?)
    }

    fn top(&self) -> Result<usize> {
        let bottom = self.marks.last().copied().unwrap_or(0);
        self.stack[bottom..].last().copied().ok_or(DAMAGED)
    }

    fn pop(&mut self) -> Result<usize> {
        let top = self.top()?;
        self.stack.pop();
        Ok(top)
    }

    /// Pops the last `count` objects.
    fn last(&mut self, count: usize) -> Result<Vec<usize>> {
        let mut last = (0..count).map(|_| self.pop()).collect::<Result<Vec<_>>>()?;
        last.reverse();
        Ok(last)
    }

    /// Pops all objects since the last mark.
    fn popped(&mut self) -> Result<Vec<usize>> {
        let mark = self.marks.pop().ok_or(DAMAGED)?;
        Ok(self.stack.split_off(mark))
    }

    fn push(&mut self, kind: Kind, bytes: &[u8], is_value: bool) -> usize {
        let own = hash(kind, bytes);
        let value = is_value.then_some(own);
        self.nodes.push(Node { kind, bytes: &[], own, value, edges: vec![] });
        self.stack.push(self.nodes.len() - 1);
        self.nodes.len() - 1
    }

    /// Pushes an integer. Its shortest form counts.
    fn int(&mut self, nbytes: usize, is_signed: bool) -> Result<()> {
        let bytes = self.take(nbytes)?;
        let mut digits = bytes.to_vec();
        if !is_signed {
            digits.push(0);
        }
        while let [.., before, last] = digits[..]
            && ((last == 0 && before < 128) || (last == 255 && before >= 128))
        {
            digits.pop();
        }
        if digits == [0] {
            digits.pop();
        }
        let node = self.push(Kind::Int, &digits, true);
        self.nodes[node].bytes = bytes;
        Ok(())
    }

    fn text(&mut self, kind: Kind, width: usize) -> Result<()> {
        let nbytes = self.number(width)?;
        let text = self.take(nbytes)?;
        let node = if kind == Kind::Bytes && text.starts_with(ARCHIVE) {
            self.push(kind, &(self.plain)(text), true)
        } else {
            self.push(kind, text, true)
        };
        self.nodes[node].bytes = text;
        Ok(())
    }

    /// Pushes an object that is complete once made. It is a value if all its parts are.
    fn compound(&mut self, kind: Kind, role: Role, parts: Vec<usize>) {
        let node = compound(&self.nodes, kind, role, parts);
        self.nodes.push(node);
        self.stack.push(self.nodes.len() - 1);
    }

    fn tuple(&mut self, count: usize) -> Result<()> {
        let parts = self.last(count)?;
        self.compound(Kind::Tuple, Role::Part, parts);
        Ok(())
    }

    fn made(&mut self, kind: Kind, count: usize) -> Result<()> {
        let parts = self.last(count)?;
        let node = self.push(kind, &[], false);
        self.nodes[node].edges = parts.into_iter().map(|part| (Role::Part, part)).collect();
        Ok(())
    }

    /// Makes the object on top refer to these, in roles that repeat.
    fn hold(&mut self, roles: &[Role], held: Vec<usize>) -> Result<()> {
        let top = self.top()?;
        if !held.len().is_multiple_of(roles.len()) {
            return Err(DAMAGED);
        }
        self.nodes[top].value = None; // Python's pickles never change a value
        self.nodes[top].edges.extend(roles.iter().copied().cycle().zip(held));
        Ok(())
    }

    fn again(&mut self, index: usize) -> Result<()> {
        self.stack.push(*self.memo.get(index).ok_or(DAMAGED)?);
        Ok(())
    }

    /// Pops the top. If it is the result of a call, that call changed its first argument.
    fn forgo(&mut self) -> Result<()> {
        if self.marks.last() == Some(&self.stack.len()) {
            self.marks.pop();
            return Ok(());
        }
        let gone = self.pop()?;
        if let (Kind::Call, [_, (_, arguments)]) =
            (self.nodes[gone].kind, &self.nodes[gone].edges[..])
            && let Some(&(_, changed)) = self.nodes[*arguments].edges.first()
            && self.nodes[changed].value.is_none()
        {
            self.nodes[changed].edges.push((Role::Change, gone));
        }
        Ok(())
    }
}

fn compound<'a>(nodes: &[Node<'a>], kind: Kind, role: Role, parts: Vec<usize>) -> Node<'a> {
    let mut values: Option<Vec<_>> = parts.iter().map(|&part| nodes[part].value).collect();
    if let (Some(values), Role::Member) = (&mut values, role) {
        values.sort_unstable();
    }
    let words = |values: Vec<u128>| values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<_>>();
    let value = values.map(|values| hash(kind, &words(values)));
    let edges = parts.into_iter().map(|part| (role, part)).collect();
    Node { kind, bytes: &[], own: hash(kind, &[]), value, edges }
}

// --- forget: drop what is specific to the process
// -------------------------------------------------

/// Attributes that are specific to the process, and useless in another one.
const FORGOTTEN: [&[u8]; 2] = [
    b"_original_object_hash", // Python's hash of a string, in generation configs of transformers 5
    b"_cloudpickle_submodules", // the modules that were imported when the function was pickled
];

/// Lists and tuples that Python makes from sets.
const UNORDERED: [&[u8]; 2] = [b"_abc_impl", b"__static_attributes__"];

impl Graph<'_> {
    /// Drops what differs between processes for equal objects.
    fn forget(&mut self) {
        let mut hooks: HashMap<u128, usize> = HashMap::new(); // a stand-in for each hook's id
        for node in 0..self.nodes.len() {
            self.forget_entries(node, &mut hooks);
            match self.nodes[node].kind {
                Kind::Call => self.forget_arguments(node),
                Kind::New => self.forget_id_of_handle(node, &mut hooks),
                _ => {}
            }
        }
    }

    /// Drops entries of a dict that are specific to the process, and the ids of hooks, which each
    /// process counts from 0.
    fn forget_entries(&mut self, node: usize, hooks: &mut HashMap<u128, usize>) {
        let mut edges = std::mem::take(&mut self.nodes[node].edges);
        let mut forgotten = false;
        for at in 0..edges.len() {
            let (Role::Key, key) = edges[at] else { continue };
            let (text, value) = (self.text(key), edges[at + 1].1);
            if FORGOTTEN.contains(&text) {
                (edges[at].1, edges[at + 1].1) = (usize::MAX, usize::MAX);
                forgotten = true;
            } else if UNORDERED.contains(&text) {
                let unordered = &mut self.nodes[value];
                unordered.value = None;
                unordered.edges.iter_mut().for_each(|(role, _)| *role = Role::Member);
            } else if is_of_hooks(text) {
                for index in 0..self.nodes[value].edges.len() {
                    if let (Role::Key, id) = self.nodes[value].edges[index] {
                        self.nodes[value].edges[index].1 = self.name_of(id, hooks);
                    }
                }
            }
        }
        if forgotten {
            edges.retain(|&(_, child)| child != usize::MAX);
        }
        self.nodes[node].edges = edges;
    }

    /// The node that stands in for a hook's id.
    fn name_of(&mut self, id: usize, hooks: &mut HashMap<u128, usize>) -> usize {
        let (Kind::Int, Some(value)) = (self.nodes[id].kind, self.nodes[id].value) else {
            return id;
        };
        *hooks.entry(value).or_insert_with(|| {
            let own = hash(Kind::Name, &[]);
            let name = Node { kind: Kind::Name, bytes: &[], own, value: None, edges: vec![] };
            self.nodes.push(name);
            self.nodes.len() - 1
        })
    }

    /// Drops arguments that carry no information: the random id that a process gives to a class
    /// pickled by value, and the file name of code, which Python ignores when it compares code.
    fn forget_arguments(&mut self, node: usize) {
        let [(_, callee), (_, arguments), ..] = self.nodes[node].edges[..] else { return };
        let parts = &self.nodes[arguments].edges;
        let forgotten = match self.name(callee) {
            Some((module, name)) if module.ends_with(b"cloudpickle.cloudpickle") => match name {
                b"_make_skeleton_class" | b"_make_skeleton_enum" => parts.len().checked_sub(2),
                b"_make_typevar" => parts.len().checked_sub(1),
                _ => None,
            },
            Some((b"ray_zerocopy.pickled", b"code")) => Some(11),
            _ => None,
        };
        if let Some(forgotten) = forgotten.filter(|&at| at < parts.len()) {
            let parts = parts.iter().map(|&(_, part)| part).enumerate();
            let kept = parts.filter(|&(at, _)| at != forgotten).map(|(_, part)| part).collect();
            let known = compound(&self.nodes, Kind::Tuple, Role::Part, kept);
            self.nodes.push(known);
            self.nodes[node].edges[1].1 = self.nodes.len() - 1;
        }
    }

    /// Replaces the id in a hook's handle, the second item of its state.
    fn forget_id_of_handle(&mut self, node: usize, hooks: &mut HashMap<u128, usize>) {
        let [(_, callee), .., (Role::State, state)] = self.nodes[node].edges[..] else { return };
        if self.name(callee) == Some((b"torch.utils.hooks", b"RemovableHandle"))
            && let Some(&(_, id)) = self.nodes[state].edges.get(1)
        {
            let name = self.name_of(id, hooks);
            self.nodes[state].edges[1].1 = name;
        }
    }

    /// The text of a string; empty for other objects.
    fn text(&self, node: usize) -> &[u8] {
        let Node { kind, bytes, .. } = self.nodes[node];
        if kind == Kind::Str { bytes } else { &[] }
    }

    /// Module and name of a global.
    fn name(&self, node: usize) -> Option<(&[u8], &[u8])> {
        match (self.nodes[node].kind, &self.nodes[node].edges[..]) {
            (Kind::Global, &[(_, module), (_, name)]) => Some((self.text(module), self.text(name))),
            _ => None,
        }
    }
}

/// Whether an attribute of torch's modules and optimizers holds hooks by id.
fn is_of_hooks(name: &[u8]) -> bool {
    const BEGINNINGS: [&[u8]; 5] =
        [b"_forward", b"_backward", b"_state_dict", b"_load_state_dict", b"_optimizer"];
    BEGINNINGS.iter().any(|beginning| name.starts_with(beginning))
        && name.windows(5).any(|part| part == b"hooks")
}

// --- walk: write the graph in one order
// -----------------------------------------------------------

/// In the words of a graph, marks a value; `AGAIN` marks an object that came before.
const VALUE: u8 = 254;
const AGAIN: u8 = 255;

impl Graph<'_> {
    /// The hash of the graph.
    fn walk(&self) -> u128 {
        let colours = self.colours();
        let mut words = Vec::new();
        let mut numbers: HashMap<usize, usize> = HashMap::new();
        let mut spans: HashMap<usize, usize> = HashMap::new();
        let mut left = vec![self.root];
        while let Some(at) = left.pop() {
            let node = &self.nodes[at];
            if let Some(value) = node.value {
                words.push(VALUE);
                words.extend(value.to_le_bytes());
                continue;
            }
            let next = numbers.len();
            let number = *numbers.entry(at).or_insert(next);
            if number != next {
                words.push(AGAIN);
                words.extend(number.to_le_bytes());
                continue;
            }
            words.push(node.kind as u8);
            words.extend(node.own.to_le_bytes());
            if let Some(&span) = self.spans.get(&at) {
                let next = spans.len();
                words.extend(spans.entry(span).or_insert(next).to_le_bytes());
            }
            words.extend(node.edges.len().to_le_bytes());
            let mut edges = node.edges.clone();
            let rank = |&(_, child): &(Role, usize)| {
                (colours(child), numbers.get(&child).copied().unwrap_or(usize::MAX))
            };
            let members = edges.iter_mut().filter(|(role, _)| *role == Role::Member);
            let mut sorted: Vec<_> = members.map(|edge| *edge).collect();
            sorted.sort_by_key(rank);
            let mut sorted = sorted.into_iter();
            for edge in edges.iter_mut().filter(|(role, _)| *role == Role::Member) {
                *edge = sorted.next().expect("as many as there are members");
            }
            words.extend(edges.iter().map(|&(role, _)| role as u8));
            left.extend(edges.iter().rev().map(|&(_, child)| child));
        }
        XxHash3_128::oneshot(&words)
    }

    /// A number for each node that orders the members of sets: values by content, objects by the
    /// objects that they refer to.
    ///
    /// Each step looks one reference further, until a step tells no more objects apart (Weisfeiler
    /// and Leman's colours).
    fn colours(&self) -> impl Fn(usize) -> u128 {
        let of_objects = |node: &Node| {
            let mut members = node.edges.iter().filter(|(role, _)| *role == Role::Member);
            node.edges.len() > 1 && members.any(|&(_, member)| self.nodes[member].value.is_none())
        };
        let first = |node: &Node| node.value.unwrap_or(node.own);
        let mut colours: Vec<_> = self.nodes.iter().map(first).collect();
        let distinct = |colours: &[u128]| colours.iter().collect::<HashSet<_>>().len();
        let mut told = if self.nodes.iter().any(of_objects) { 0 } else { usize::MAX };
        for _ in 0..ROUNDS {
            let now = distinct(&colours);
            if now <= told {
                break;
            }
            told = now;
            colours = self
                .nodes
                .iter()
                .map(|node| {
                    node.value.unwrap_or_else(|| {
                        let mut words = node.own.to_le_bytes().to_vec();
                        let mut members = Vec::new();
                        for &(role, child) in &node.edges {
                            match role {
                                Role::Member => members.push(colours[child]),
                                _ => {
                                    words.push(role as u8);
                                    words.extend(colours[child].to_le_bytes());
                                }
                            }
                        }
                        members.sort_unstable();
                        words.extend(members.iter().flat_map(|member| member.to_le_bytes()));
                        hash(node.kind, &words)
                    })
                })
                .collect();
        }
        move |node| colours[node]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// `{"a": {1, 2, 3}, "b": frozenset({(1, "x"), 2}), "c": [1.5, b"y", None, True, 2**70,
    /// OrderedDict(a=1)], "_forward_hooks": {7: 1}, "_original_object_hash": 3, "d": that of "c"}`
    const PICKLE: &[u8] = b"\x80\x05}\x94(\x8c\x01a\x94\x8f\x94(K\x01K\x02K\x03\x90\x8c\x01b\x94(K\x02\
        K\x01\x8c\x01x\x94\x86\x94\x91\x94\x8c\x01c\x94]\x94(G?\xf8\x00\x00\x00\x00\x00\x00C\x01y\x94N\
        \x88\x8a\t\x00\x00\x00\x00\x00\x00\x00\x00@\x8c\x0bcollections\x94\x8c\x0bOrderedDict\x94\x93\
        \x94)R\x94h\x01K\x01se\x8c\x0e_forward_hooks\x94}\x94K\x07K\x01s\x8c\x15_original_object_hash\
        \x94K\x03\x8c\x01d\x94h\x08u.";

    fn digest_of(pickle: &[u8]) -> Result<u128> {
        let table = Table { nbytes: 64, spans: vec![], views: vec![] };
        digest(pickle, &table, &[], &[], &|archive| archive.to_vec())
    }

    /// The pickle with `found`, which it has once, replaced by `other`.
    fn with(found: &[u8], other: &[u8]) -> Vec<u8> {
        let at = PICKLE.windows(found.len()).position(|part| part == found).unwrap();
        [&PICKLE[..at], other, &PICKLE[at + found.len()..]].concat()
    }

    #[test]
    fn what_the_process_alone_knows_counts_for_nothing() {
        let (three, reversed) = (b"(K\x01K\x02K\x03\x90", b"(K\x03K\x02K\x01\x90");
        let (hash, another) = (b"hash\x94K\x03", b"hash\x94K\x09");
        let (hook, later) = (b"}\x94K\x07K\x01s", b"}\x94K\x21K\x01s");
        let (short, long) = (b"t\x94\x93\x94)R\x94h\x01K\x01", b"t\x94\x93\x94)R\x94h\x01M\x01\0");
        for same in [
            with(three, reversed),
            with(hash, another),
            with(hook, later),
            with(&short[..], &long[..]),
        ] {
            assert_eq!(digest_of(&same), digest_of(PICKLE));
        }
        for other in [with(three, b"(K\x01K\x02K\x04\x90"), with(b"C\x01y", b"C\x01z")] {
            assert_ne!(digest_of(&other), digest_of(PICKLE));
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_refused_or_have_a_digest(bytes: Vec<u8>) {
            let _ = digest_of(&bytes);
        }

        #[test]
        fn a_damaged_skeleton_is_refused_or_has_a_digest(
            at in 0..PICKLE.len(), byte: u8, cut in 0..PICKLE.len(),
        ) {
            let mut damaged = PICKLE.to_vec();
            damaged[at] = byte;
            let _ = digest_of(&damaged);
            prop_assert!(digest_of(&PICKLE[..cut]).is_err());
        }
    }
}
