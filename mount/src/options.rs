//! The `-o` options: which are the kernel's, which are ours, which mean nothing to us and which are refused.
//!
//! `mount(8)` passes everything it finds in fstab, so what only concerns it or systemd is left out silently, and what
//! nobody knows is refused: a misspelt `nosuid` must not go unnoticed.

use std::path::PathBuf;

use rustix::mount::MountFlags;

/// The type under which the kernel lists the mount.
pub const FILE_SYSTEM_TYPE: &str = "fuse.mortar";

/// What the `-o` options amount to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Options {
    /// Flags for mount(2).
    pub flags: MountFlags,
    /// Options that go to the kernel as text (`context=` and its kin), as given, quotes included.
    pub kernel: Vec<String>,
    /// Where to write the log.
    pub log_file: Option<PathBuf>,
    /// How much to log.
    pub log_level: Option<String>,
}

/// The generic flags of mount(8): a name, the flag, and whether the name sets or clears it.
const FLAGS: &[(&str, MountFlags, bool)] = &[
    ("ro", MountFlags::RDONLY, true),
    ("rw", MountFlags::RDONLY, false),
    ("nosuid", MountFlags::NOSUID, true),
    ("suid", MountFlags::NOSUID, false),
    ("nodev", MountFlags::NODEV, true),
    ("dev", MountFlags::NODEV, false),
    ("noexec", MountFlags::NOEXEC, true),
    ("exec", MountFlags::NOEXEC, false),
    ("sync", MountFlags::SYNCHRONOUS, true),
    ("async", MountFlags::SYNCHRONOUS, false),
    ("dirsync", MountFlags::DIRSYNC, true),
    ("noatime", MountFlags::NOATIME, true),
    ("atime", MountFlags::NOATIME, false),
    ("nodiratime", MountFlags::NODIRATIME, true),
    ("diratime", MountFlags::NODIRATIME, false),
    ("relatime", MountFlags::RELATIME, true),
    ("norelatime", MountFlags::RELATIME, false),
    ("strictatime", MountFlags::STRICTATIME, true),
    ("nostrictatime", MountFlags::STRICTATIME, false),
    ("lazytime", MountFlags::LAZYTIME, true),
    ("nolazytime", MountFlags::LAZYTIME, false),
    ("nosymfollow", MountFlags::NOSYMFOLLOW, true),
    ("symfollow", MountFlags::NOSYMFOLLOW, false),
];

/// Options for mount(8), fstab and systemd, and those of FUSE that are always on.
const IGNORED: &[&str] = &[
    "defaults",
    "_netdev",
    "auto",
    "noauto",
    "nofail",
    "fail",
    "user",
    "nouser",
    "users",
    "nousers",
    "owner",
    "noowner",
    "group",
    "nogroup",
    "comment",
    "allow_other",
    "default_permissions",
];

/// SELinux labels that the kernel understands.
const LABELS: &[&str] = &["context", "fscontext", "defcontext", "rootcontext"];

/// Reads the arguments of every `-o`.
///
/// # Errors
/// A sentence that names the option and what to do.
pub fn parse<S: AsRef<str>>(lists: &[S]) -> Result<Options, String> {
    let mut options = Options { flags: MountFlags::empty(), kernel: Vec::new(), log_file: None, log_level: None };
    for list in lists {
        for option in split(list.as_ref())? {
            options.add(option)?;
        }
    }
    Ok(options)
}

impl Options {
    fn add(&mut self, option: &str) -> Result<(), String> {
        let (name, value) = match option.split_once('=') {
            Some((name, value)) => (name, Some(value)),
            None => (option, None),
        };
        if name.is_empty() && value.is_none() {
            return Ok(());
        }
        if value.is_none()
            && let Some((_, flag, set)) = FLAGS.iter().find(|(n, _, _)| *n == name)
        {
            self.flags.set(*flag, *set);
            return Ok(());
        }
        if IGNORED.contains(&name) || name.starts_with("x-") || name.starts_with("X-") {
            return Ok(());
        }
        match (name, value) {
            (label, Some(value)) if LABELS.contains(&label) && !value.is_empty() => self.kernel.push(option.to_owned()),
            ("log-file", Some(value)) if !value.is_empty() => self.log_file = Some(PathBuf::from(value)),
            ("log-level", Some(value)) => self.log_level = Some(check_level(value)?),
            ("remount", _) => {
                return Err("the option 'remount' is not supported: unmount the volume and mount it again.".into());
            }
            _ if LABELS.contains(&name) || matches!(name, "log-file" | "log-level") => {
                return Err(format!("the option '{name}' needs a value: write '{name}=VALUE'."));
            }
            _ => {
                return Err(format!(
                    "the option '{option}' is not known: see 'mortar-mount --help' for those that are, and remove or correct it."
                ));
            }
        }
        Ok(())
    }
}

/// A level of logging.
///
/// # Errors
/// A sentence that names those there are.
pub fn check_level(value: &str) -> Result<String, String> {
    match value {
        "error" | "warn" | "info" | "debug" | "trace" => Ok(value.to_owned()),
        _ => Err(format!("'{value}' is no log level: use error, warn, info, debug or trace.")),
    }
}

/// Splits at commas that are not inside double quotes: SELinux levels such as `s0:c1,c2` contain some.
fn split(list: &str) -> Result<Vec<&str>, String> {
    let mut parts = Vec::new();
    let mut quoted = false;
    let mut start = 0;
    for (at, c) in list.char_indices() {
        match c {
            '"' => quoted = !quoted,
            ',' if !quoted => {
                parts.push(&list[start..at]);
                start = at + 1;
            }
            _ => {}
        }
    }
    if quoted {
        return Err(format!("a double quote is not closed in the options '{list}'."));
    }
    parts.push(&list[start..]);
    Ok(parts)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flags(list: &str) -> MountFlags {
        parse(&[list]).unwrap().flags
    }

    #[test]
    fn generic_flags_are_the_kernels_and_the_last_of_two_counts() {
        assert_eq!(
            flags("ro,nosuid,nodev,noatime"),
            MountFlags::RDONLY | MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOATIME
        );
        assert_eq!(flags("ro,rw"), MountFlags::empty());
        assert_eq!(parse(&["rw", "ro"]).unwrap().flags, MountFlags::RDONLY);
        assert_eq!(flags(""), MountFlags::empty());
    }

    #[test]
    fn what_only_concerns_mount_and_systemd_is_left_out() {
        let options = parse(&[
            "defaults,_netdev,nofail,auto,noauto,user,x-systemd.before=libvirtd.service,x-gvfs-hide,comment=a",
        ]);
        assert_eq!(options, parse::<&str>(&[]));
    }

    #[test]
    fn labels_go_to_the_kernel_with_their_quoted_commas() {
        let options =
            parse(&["ro,context=\"system_u:object_r:virt_image_t:s0:c1,c2\",fscontext=a:b:c:s0,nodev"]).unwrap();
        assert_eq!(options.kernel, ["context=\"system_u:object_r:virt_image_t:s0:c1,c2\"", "fscontext=a:b:c:s0"]);
        assert_eq!(options.flags, MountFlags::RDONLY | MountFlags::NODEV);
    }

    #[test]
    fn the_log_can_be_set_in_fstab() {
        let options = parse(&["log-file=/var/log/mortar/a.log,log-level=debug"]).unwrap();
        assert_eq!(options.log_file.as_deref(), Some(std::path::Path::new("/var/log/mortar/a.log")));
        assert_eq!(options.log_level.as_deref(), Some("debug"));
    }

    #[test]
    fn everything_else_is_refused_with_its_name() {
        for (list, named) in [
            ("nosiud", "'nosiud'"),
            ("ro=1", "'ro=1'"),
            ("cache=always", "'cache=always'"),
            ("context", "'context'"),
            ("log-level=loud", "'loud'"),
            ("remount,ro", "'remount'"),
            ("context=\"a,b", "quote"),
        ] {
            let sentence = parse(&[list]).unwrap_err();
            assert!(sentence.contains(named) && sentence.ends_with('.'), "{list}: {sentence}");
        }
    }
}
