//! Where the log goes: standard error in the foreground; a file if one is named, or if the package's folder is there.

use std::fs::OpenOptions;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use tracing_subscriber::EnvFilter;

/// Made by the package.
const FOLDER: &str = "/var/log/mortar";

/// The log of a mount in the background whose administrator named none.
#[must_use]
pub fn default_file(mount_point: &Path) -> Option<PathBuf> {
    let name = mount_point.to_string_lossy().trim_matches('/').replace('/', "-");
    let folder = Path::new(FOLDER);
    folder.is_dir().then(|| folder.join(format!("mount-{name}.log")))
}

/// Starts logging. `RUST_LOG` overrides `level`.
///
/// # Errors
/// A sentence, when the file cannot be written.
pub fn start(file: Option<&Path>, level: &str) -> Result<(), String> {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(level));
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_target(false);
    match file {
        Some(path) => {
            let file = OpenOptions::new()
                .create(true)
                .append(true)
                .open(path)
                .map_err(|e| format!("the log file {} cannot be written: {e}.", path.display()))?;
            builder.with_ansi(false).with_writer(Mutex::new(file)).init();
        }
        None => {
            builder.with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr())).with_writer(std::io::stderr).init()
        }
    }
    let default = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        tracing::error!("a bug in mortar-mount: {info}");
        default(info);
    }));
    Ok(())
}
