//! The system calls of every Unix: descriptors and forks.

use std::fs;
use std::io::PipeReader;
use std::os::fd::{AsRawFd, RawFd};
use std::time::Duration;

/// The highest descriptor to try, if the system does not list them.
const DESCRIPTORS: RawFd = 4096;

/// The descriptors of this process, or numbers that may be descriptors.
pub fn descriptors() -> Vec<RawFd> {
    match fs::read_dir("/dev/fd") {
        Ok(listed) => {
            let number = |entry: fs::DirEntry| entry.file_name().to_str()?.parse().ok();
            listed.flatten().filter_map(number).collect()
        }
        Err(_) => (0..DESCRIPTORS).collect(),
    }
}

/// Waits until all copies of the other end of one of these pipes are closed, or until the timeout.
/// Returns whether one is closed. Nobody writes to them.
pub fn wait_for_end(pipes: &[&PipeReader], timeout: Duration) -> bool {
    let asked = |pipe: &&PipeReader| libc::pollfd { fd: pipe.as_raw_fd(), events: 0, revents: 0 };
    let mut asked: Vec<_> = pipes.iter().map(asked).collect();
    let timeout = timeout.as_millis().try_into().unwrap_or(libc::c_int::MAX);
    // SAFETY: an array of structures, and its length.
    unsafe { libc::poll(asked.as_mut_ptr(), asked.len() as libc::nfds_t, timeout) };
    asked.iter().any(|asked| asked.revents & libc::POLLHUP != 0)
}

/// Registers functions that every later `fork` calls: before it, and after it in the parent and in
/// the child.
pub fn at_fork(before: extern "C" fn(), after: extern "C" fn(), in_child: extern "C" fn()) {
    // SAFETY: the functions exist as long as the process, because Python never unloads an
    // extension.
    unsafe { libc::pthread_atfork(Some(before), Some(after), Some(in_child)) };
}
