//! Compiles `wire/*.proto`, without protoc.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=wire");
    #[cfg(feature = "wire")]
    {
        let files = ["wire/peer.proto", "wire/session.proto", "wire/cluster.proto", "wire/data.proto"];
        let set = protox::compile(files, ["wire"])?;
        tonic_prost_build::configure()
            .bytes(".")
            .type_attribute(".mortar.cluster", "#[derive(serde::Serialize)]")
            .compile_fds(set)?;
    }
    Ok(())
}
