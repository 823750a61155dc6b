//! `blkferry generate`: what packagers need, made from the same declarations as the command line itself.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context;
use clap::CommandFactory;
use clap_complete::Shell;

use super::Cli;

/// Write man pages or shell completions
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, clap::Subcommand)]
enum What {
    /// A man page for the program and for each verb: blkferry.1, blkferry-attach.1, …
    Man {
        /// Where they are written; it has to be there
        directory: PathBuf,
    },
    /// Completions, on standard output
    Completions {
        /// For which shell
        shell: Shell,
    },
}

pub(super) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let mut command = Cli::command();
    match &args.what {
        What::Man { directory } => man(command, directory)?,
        What::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(*shell, &mut command, "blkferry", &mut script);
            super::say(format_args!("{}", String::from_utf8_lossy(&script)))?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn man(mut command: clap::Command, directory: &Path) -> anyhow::Result<()> {
    // Names of verbs become blkferry-VERB only then.
    command.build();
    page(command.clone(), directory)?;
    for verb in command.get_subcommands().filter(|verb| !verb.is_hide_set() && verb.get_name() != "help") {
        page(verb.clone().disable_help_subcommand(true), directory)?;
    }
    Ok(())
}

fn page(command: clap::Command, directory: &Path) -> anyhow::Result<()> {
    let name = command.get_display_name().unwrap_or(command.get_name()).replace(' ', "-");
    let path = directory.join(format!("{name}.1"));
    let mut text = Vec::new();
    clap_mangen::Man::new(command).render(&mut text)?;
    fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))
}
