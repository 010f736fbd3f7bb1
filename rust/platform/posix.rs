//! What every Unix has: descriptors, and forks.

use std::fs;
use std::io::PipeReader;
use std::os::fd::{AsRawFd, RawFd};
use std::time::Duration;

/// Where the system does not list them, descriptors up to this are tried.
const DESCRIPTORS: RawFd = 4096;

/// The descriptors of this process, or numbers that may be such.
pub fn descriptors() -> Vec<RawFd> {
    match fs::read_dir("/dev/fd") {
        Ok(listed) => {
            let number = |entry: fs::DirEntry| entry.file_name().to_str()?.parse().ok();
            listed.flatten().filter_map(number).collect()
        }
        Err(_) => (0..DESCRIPTORS).collect(),
    }
}

/// Waits until the other end of one of these pipes is closed by all who have it, or no longer; says whether one is.
/// Nobody writes to them.
pub fn wait_for_end(pipes: &[&PipeReader], timeout: Duration) -> bool {
    let asked = |pipe: &&PipeReader| libc::pollfd { fd: pipe.as_raw_fd(), events: 0, revents: 0 };
    let mut asked: Vec<_> = pipes.iter().map(asked).collect();
    let timeout = timeout.as_millis().try_into().unwrap_or(libc::c_int::MAX);
    // SAFETY: as many structures as it is told that there are.
    unsafe { libc::poll(asked.as_mut_ptr(), asked.len() as libc::nfds_t, timeout) };
    asked.iter().any(|asked| asked.revents & libc::POLLHUP != 0)
}

/// Has functions called with each `fork` from now on: before it, and after it in both processes.
pub fn at_fork(before: extern "C" fn(), after: extern "C" fn(), in_child: extern "C" fn()) {
    // SAFETY: functions that are there for as long as the process: no extension is ever unloaded.
    unsafe { libc::pthread_atfork(Some(before), Some(after), Some(in_child)) };
}
