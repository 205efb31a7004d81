//! The one place where an `errno` is decided.
//!
//! A bad moment of the cluster never looks like a broken file system: no `EROFS`, no `ENOTCONN` `[E3]`. What is addressed by
//! its number and is no more gives `ESTALE`: the kernel then walks the path again, and finds what another mount put there.

use mortar_proto::client::IoError;
use mortar_proto::metadata::NameError;

/// An `errno`, positive.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Errno(pub i32);

impl Errno {
    /// The handle is not one of ours.
    pub const BADF: Self = Self(libc::EBADF);
    /// The arguments make no sense.
    pub const INVAL: Self = Self(libc::EINVAL);
    /// The answer is not one to this question, or a callback was lost.
    pub const IO: Self = Self(libc::EIO);
    /// It is a directory.
    pub const ISDIR: Self = Self(libc::EISDIR);
    /// There is no such offset.
    pub const NXIO: Self = Self(libc::ENXIO);
    /// Not offered.
    pub const OPNOTSUPP: Self = Self(libc::EOPNOTSUPP);
    /// The buffer is too small.
    pub const RANGE: Self = Self(libc::ERANGE);
    /// It is no more: walk the path again.
    pub const STALE: Self = Self(libc::ESTALE);
    /// No such attribute.
    pub const NODATA: Self = Self(libc::ENODATA);
    /// No such name.
    pub const NOENT: Self = Self(libc::ENOENT);
    /// The name is there already.
    pub const EXIST: Self = Self(libc::EEXIST);

    /// For an operation that addressed an inode by its number, not by a name.
    #[must_use]
    pub fn of_inode(self) -> Self {
        if self == Self::NOENT { Self::STALE } else { self }
    }
}

impl From<NameError> for Errno {
    fn from(error: NameError) -> Self {
        Self(match error {
            NameError::NotFound => libc::ENOENT,
            NameError::Exists => libc::EEXIST,
            NameError::NotDirectory => libc::ENOTDIR,
            NameError::IsDirectory => libc::EISDIR,
            NameError::NotEmpty => libc::ENOTEMPTY,
            NameError::Invalid => libc::EINVAL,
            NameError::NameTooLong => libc::ENAMETOOLONG,
            NameError::NotPermitted => libc::EPERM,
            NameError::NoAttribute => libc::ENODATA,
            NameError::TooManyLinks => libc::EMLINK,
            NameError::NoSpace => libc::ENOSPC,
            NameError::TooBig => libc::E2BIG,
            // Not ESTALE: the kernel would walk the path again, in vain.
            NameError::SessionEnded => libc::EIO,
            NameError::Busy => libc::EBUSY,
        })
    }
}

impl From<IoError> for Errno {
    fn from(error: IoError) -> Self {
        match error {
            // What a full or small brick says is the application's to know.
            IoError::Errno(
                errno @ (libc::ENOSPC | libc::EDQUOT | libc::EFBIG | libc::EINVAL | libc::EOPNOTSUPP | libc::ENXIO),
            ) => Self(errno),
            // The data is reclaimed: the last name is gone, and nobody has it open.
            IoError::Errno(libc::ENOENT | libc::ESTALE) => Self::STALE,
            error => {
                tracing::warn!("an operation failed: {error}");
                Self::IO
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bad_moment_of_the_cluster_is_an_io_error_and_nothing_else() {
        for error in [
            IoError::NoQuorum,
            IoError::SessionLost,
            IoError::Closed,
            IoError::Evicted,
            IoError::Control("no leader".into()),
            IoError::Errno(libc::EROFS),
            IoError::Errno(libc::ENOTCONN),
            IoError::Errno(-3),
            IoError::Errno(0),
        ] {
            assert_eq!(Errno::from(error.clone()), Errno::IO, "{error:?}");
        }
    }

    #[test]
    fn a_full_volume_says_so() {
        assert_eq!(Errno::from(IoError::Errno(libc::ENOSPC)), Errno(libc::ENOSPC));
        assert_eq!(Errno::from(NameError::NoSpace), Errno(libc::ENOSPC));
    }

    #[test]
    fn what_is_gone_by_number_makes_the_kernel_walk_the_path_again() {
        assert_eq!(Errno::from(NameError::NotFound), Errno::NOENT);
        assert_eq!(Errno::from(NameError::NotFound).of_inode(), Errno::STALE);
        assert_eq!(Errno::from(NameError::NotDirectory).of_inode(), Errno(libc::ENOTDIR));
        assert_eq!(Errno::from(IoError::Errno(libc::ENOENT)), Errno::STALE);
    }
}
