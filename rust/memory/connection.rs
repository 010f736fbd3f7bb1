//! Connections to Ray's store, kept open while their objects are mapped.
//!
//! ```text
//!  Ray's client ─ its descriptor ─┐
//!                                 ├─ connection ─▶ the store: keeps the objects in use
//!  block ───── a second one ──────┘
//! ```
//!
//! The store keeps each object that a client uses until the client releases it, or the connection
//! ends. A connection ends with its last descriptor. `ray.shutdown()` closes Ray's descriptor.
//! Without a second one, the store would reuse memory that this process still maps.

use std::fs::File;
use std::mem::ManuallyDrop;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use crate::error::{Error, Result};
use crate::platform;

/// A connection that stays open while this lives.
#[derive(Debug)]
pub struct Connection {
    path: PathBuf,
    /// For each socket: the descriptor of Ray's client, and our duplicate.
    sockets: Vec<(RawFd, OwnedFd)>,
}

/// The connections of this process, and the descriptors of others that were found last. A search
/// through all descriptors takes 45 us, as long as opening a block.
static KEPT: Mutex<(Vec<Weak<Connection>>, Vec<RawFd>)> = Mutex::new((Vec::new(), Vec::new()));

impl Connection {
    /// Keeps this process's connection to the socket at a path. `None` if it has none.
    pub fn keep(path: &Path) -> Result<Option<Arc<Connection>>> {
        let mut guard = KEPT.lock().unwrap_or_else(PoisonError::into_inner);
        let (kept, found) = &mut *guard;
        kept.retain(|connection| connection.strong_count() > 0);
        let alive: Vec<_> = kept.iter().filter_map(Weak::upgrade).collect();
        if let Some(known) = alive.iter().find(|known| known.path == path && known.stands()) {
            return Ok(Some(Arc::clone(known)));
        }
        let ours = |other: RawFd| {
            let mut sockets = alive.iter().flat_map(|connection| &connection.sockets);
            sockets.any(|(_, own)| own.as_raw_fd() == other)
        };
        let mut sockets = second_descriptors(found, path, ours)?;
        if sockets.len() < found.len() || sockets.is_empty() {
            sockets = second_descriptors(&platform::descriptors(), path, ours)?;
        }
        *found = sockets.iter().map(|(other, _)| *other).collect();
        if sockets.is_empty() {
            return Ok(None);
        }
        let connection = Arc::new(Connection { path: path.to_owned(), sockets });
        kept.push(Arc::downgrade(&connection));
        Ok(Some(connection))
    }

    /// Whether the client's descriptors still belong to the same sockets. Our duplicate keeps the
    /// inode from being reused.
    fn stands(&self) -> bool {
        self.sockets.iter().all(|(other, own)| {
            let inode = inode(*other);
            inode.is_some() && inode == self::inode(own.as_raw_fd())
        })
    }
}

/// Duplicates those of some descriptors that are sockets to `path`, and not ours.
fn second_descriptors(
    others: &[RawFd],
    path: &Path,
    ours: impl Fn(RawFd) -> bool,
) -> Result<Vec<(RawFd, OwnedFd)>> {
    let mut sockets = Vec::new();
    for &other in others.iter().filter(|&&other| !ours(other)) {
        if let Some(stream) = borrowed(other).filter(|stream| leads_to(stream, path)) {
            let own = stream.try_clone().map_err(|error| {
                Error::refused("a second descriptor of the connection to Ray's store", &error)
            })?;
            // the number may have been reused before it was duplicated
            if leads_to(&own, path) {
                sockets.push((other, own.into()));
            }
        }
    }
    Ok(sockets)
}

/// A descriptor of other code as a socket. It may be something else: then socket calls fail.
fn borrowed(descriptor: RawFd) -> Option<ManuallyDrop<UnixStream>> {
    // SAFETY: not negative; never closed here.
    (descriptor >= 0).then(|| ManuallyDrop::new(unsafe { UnixStream::from_raw_fd(descriptor) }))
}

fn leads_to(stream: &UnixStream, path: &Path) -> bool {
    stream.peer_addr().is_ok_and(|peer| peer.as_pathname() == Some(path))
}

fn inode(descriptor: RawFd) -> Option<u64> {
    // SAFETY: not negative; never closed here.
    let file = ManuallyDrop::new(unsafe { File::from_raw_fd(descriptor) });
    file.metadata().ok().map(|metadata| metadata.ino())
}

#[cfg(test)]
mod tests {
    use std::io::{ErrorKind, Read};
    use std::os::unix::net::UnixListener;
    use std::time::Duration;

    use super::*;

    struct Server {
        listener: UnixListener,
        path: PathBuf,
    }

    impl Server {
        fn new(name: &str) -> Server {
            let path = std::env::temp_dir().join(format!("rzc-{name}-{}", std::process::id()));
            let _ = std::fs::remove_file(&path);
            Server { listener: UnixListener::bind(&path).unwrap(), path }
        }

        /// A client, and the server's end of its connection.
        fn connect(&self) -> (UnixStream, UnixStream) {
            let client = UnixStream::connect(&self.path).unwrap();
            let (served, _) = self.listener.accept().unwrap();
            served.set_read_timeout(Some(Duration::from_millis(20))).unwrap();
            (client, served)
        }
    }

    impl Drop for Server {
        fn drop(&mut self) {
            let _ = std::fs::remove_file(&self.path);
        }
    }

    /// Children that other tests fork hold copies for a moment, so it waits.
    fn ends(served: &UnixStream) -> bool {
        (0..1000).any(|_| has_ended(served))
    }

    fn has_ended(mut served: &UnixStream) -> bool {
        match served.read(&mut [0]) {
            Ok(nbytes) => nbytes == 0,
            Err(error) => {
                assert!(matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut));
                false
            }
        }
    }

    #[test]
    fn a_connection_ends_with_the_last_who_keeps_it() {
        let server = Server::new("kept");
        assert!(Connection::keep(&server.path).unwrap().is_none());
        let (client, served) = server.connect();
        let one = Connection::keep(&server.path).unwrap().unwrap();
        let other = Connection::keep(&server.path).unwrap().unwrap();
        assert!(Arc::ptr_eq(&one, &other));
        drop(client);
        drop(one);
        assert!(!has_ended(&served));
        drop(other);
        assert!(ends(&served));
    }

    #[test]
    fn a_client_that_connects_again_has_a_connection_of_its_own() {
        let server = Server::new("again");
        let (client, first_served) = server.connect();
        let first = Connection::keep(&server.path).unwrap().unwrap();
        drop(client);
        assert!(Connection::keep(&server.path).unwrap().is_none(), "ours is not the client's");
        let (client, second_served) = server.connect();
        let second = Connection::keep(&server.path).unwrap().unwrap();
        drop(first);
        drop(client);
        assert!(ends(&first_served) && !has_ended(&second_served));
        drop(second);
        assert!(ends(&second_served));
    }
}
