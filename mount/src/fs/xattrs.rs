//! Extended attributes. The log keeps them, so all mounts see the same.

use mortar_proto::Ino;
use mortar_proto::metadata::{Answer, NameOp, Query};

use super::{Caller, Errno, Fs, unfitting};

/// File capabilities, which a write takes away.
pub const CAPABILITY: &[u8] = b"security.capability";
const TRUSTED: &[u8] = b"trusted.";

/// Namespaces that are kept. `system.` has POSIX ACLs, which nobody would enforce.
fn check_name(name: &[u8]) -> Result<(), Errno> {
    let kept: [&[u8]; 3] = [b"user.", TRUSTED, b"security."];
    if kept.iter().any(|space| name.starts_with(space)) { Ok(()) } else { Err(Errno::OPNOTSUPP) }
}

impl Fs {
    /// A value.
    pub async fn getxattr(&self, ino: Ino, name: &[u8]) -> Result<Vec<u8>, Errno> {
        check_name(name)?;
        match self.ask(Query::Xattr { ino, name: name.to_vec() }).await.map_err(Errno::of_inode)? {
            Answer::Bytes(value) => Ok(value),
            answer => Err(unfitting(&answer)),
        }
    }

    /// All names, each ended by a zero byte. Ordinary users do not see `trusted.`.
    pub async fn listxattr(&self, caller: Caller, ino: Ino) -> Result<Vec<u8>, Errno> {
        let names = match self.ask(Query::XattrNames { ino }).await.map_err(Errno::of_inode)? {
            Answer::Names(names) => names,
            answer => return Err(unfitting(&answer)),
        };
        let mut list = Vec::new();
        for name in names.iter().filter(|n| caller.uid == 0 || !n.starts_with(TRUSTED)) {
            list.extend_from_slice(name);
            list.push(0);
        }
        Ok(list)
    }

    /// Sets a value; `flags` as for setxattr(2).
    pub async fn setxattr(&self, ino: Ino, name: &[u8], value: Vec<u8>, flags: i32) -> Result<(), Errno> {
        check_name(name)?;
        let (create, replace) = (flags & libc::XATTR_CREATE != 0, flags & libc::XATTR_REPLACE != 0);
        let result = self.submit(NameOp::SetXattr { ino, name: name.to_vec(), value, create, replace }).await;
        if name == CAPABILITY
            && let Some(open) = self.handles.of_inode(ino)
        {
            open.privileges.capability_set();
        }
        result.map(drop).map_err(Errno::of_inode)
    }

    /// Removes a value.
    pub async fn removexattr(&self, ino: Ino, name: &[u8]) -> Result<(), Errno> {
        check_name(name)?;
        self.submit(NameOp::RemoveXattr { ino, name: name.to_vec() }).await.map(drop).map_err(Errno::of_inode)
    }
}

/// What goes into a buffer of `size` bytes: for 0, only how long it is.
///
/// # Errors
/// `ERANGE` when it does not fit.
pub fn fit(value: Vec<u8>, size: u32) -> Result<Fitted, Errno> {
    let length = u32::try_from(value.len()).map_err(|_| Errno::RANGE)?;
    match size {
        0 => Ok(Fitted::Length(length)),
        _ if length > size => Err(Errno::RANGE),
        _ => Ok(Fitted::Value(value)),
    }
}

/// An answer to getxattr(2) and listxattr(2).
#[derive(PartialEq, Eq, Debug)]
pub enum Fitted {
    /// Its length in bytes.
    Length(u32),
    /// Itself.
    Value(Vec<u8>),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn acls_and_unknown_namespaces_are_not_offered() {
        for name in [&b"system.posix_acl_access"[..], b"system.posix_acl_default", b"other.x", b"user"] {
            assert_eq!(check_name(name), Err(Errno::OPNOTSUPP));
        }
        for name in [&b"user.a"[..], b"trusted.libvirt.security.dac", b"security.selinux"] {
            assert_eq!(check_name(name), Ok(()));
        }
    }

    #[test]
    fn a_probe_gets_the_length_and_a_small_buffer_erange() {
        assert_eq!(fit(vec![1, 2, 3], 0), Ok(Fitted::Length(3)));
        assert_eq!(fit(vec![1, 2, 3], 2), Err(Errno::RANGE));
        assert_eq!(fit(vec![1, 2, 3], 3), Ok(Fitted::Value(vec![1, 2, 3])));
        assert_eq!(fit(vec![], 5), Ok(Fitted::Value(vec![])));
    }
}
