//! Processor time of processes, from `/proc/PID/stat`. Work that the kernel does in its own threads is nobody's and not in it.

use anyhow::{Context as _, Result};

/// Seconds of processor time that these processes, with all their threads, have used so far.
///
/// # Errors
/// When one of them does not exist: a figure without it would be wrong.
pub fn seconds(pids: &[u32]) -> Result<f64> {
    let mut ticks = 0;
    for pid in pids {
        let path = format!("/proc/{pid}/stat");
        let text = std::fs::read_to_string(&path).with_context(|| format!("reading {path}: did the process end?"))?;
        ticks += ticks_in(&text).with_context(|| format!("{path} has no processor times: {text}"))?;
    }
    // SAFETY: sysconf reads a number and touches no memory of ours.
    let per_second = unsafe { libc::sysconf(libc::_SC_CLK_TCK) };
    Ok(ticks as f64 / per_second as f64)
}

/// User and system time, fields 14 and 15. The name before them, in parentheses, may hold anything.
fn ticks_in(stat: &str) -> Option<u64> {
    let after = stat.get(stat.rfind(')')? + 1..)?;
    let mut fields = after.split_whitespace().skip(11);
    let user: u64 = fields.next()?.parse().ok()?;
    let system: u64 = fields.next()?.parse().ok()?;
    Some(user + system)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn user_and_system_time_are_found_after_any_name() {
        assert_eq!(ticks_in("7 (a ) b (c) S 1 2 3 4 5 6 7 8 9 10 40 2 0 0 20 0"), Some(42));
        assert_eq!(ticks_in("7 (a"), None);
        assert!(seconds(&[std::process::id()]).is_ok());
        assert!(seconds(&[u32::MAX]).is_err());
    }
}
