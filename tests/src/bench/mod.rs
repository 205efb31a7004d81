//! Speed of mounted file systems, side by side: the same fio jobs, in rounds, on each of several directories.
//!
//! | file | owns |
//! | --- | --- |
//! | `jobs` | what is measured: the fio jobs |
//! | `fio` | running one job on one directory, and reading what fio reports |
//! | `cpu` | processor time of the processes that serve a directory |
//! | `report` | medians, ratios within a round, the table |
//! | `null` | a FUSE file system that does nothing: the limit that FUSE itself sets |

pub mod cpu;
pub mod fio;
pub mod jobs;
pub mod null;
pub mod report;
