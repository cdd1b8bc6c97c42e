//! The `anykvm` command.

use std::io::Write;
use std::process::ExitCode;

use anykvm::check::{Report, facts::Facts};
use anykvm::cli::{Cli, Command, FetchArgs};
use anykvm::error::{EXIT_FAILED, EXIT_USAGE};
use anykvm::guest::Cache;
use anykvm::progress::Progress;
use anykvm::{Error, bench, exec, run, terminal};
use clap::Parser;
use clap::error::ErrorKind;

fn main() -> ExitCode {
    std::panic::set_hook(Box::new(|panic| {
        terminal::restore();
        let text = Error::new(panic.to_string());
        eprintln!("anykvm: this is a mistake in AnyKVM, please report it: {text}");
    }));
    let result = std::panic::catch_unwind(real_main).unwrap_or(Ok(EXIT_FAILED));
    terminal::restore();
    match result {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprintln!("anykvm: {error}");
            ExitCode::from(error.exit_code())
        }
    }
}

fn real_main() -> Result<u8, Error> {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return usage(&error),
    };
    start_log(cli.log.into());
    match cli.command {
        Command::Run(args) => {
            vmm::heap::return_large_allocations();
            run::run(&args)
        }
        Command::Exec(args) => exec::exec(&args),
        Command::Check(args) => check(args.json),
        Command::Bench(args) if args.guest => {
            bench::guest();
            Ok(0)
        }
        Command::Bench(args) => bench::run(&args),
        Command::Fetch(args) => fetch(&args),
    }
}

/// Help goes out as it is; a mistake becomes one line.
fn usage(error: &clap::Error) -> Result<u8, Error> {
    let code = match error.kind() {
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => 0,
        ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => EXIT_USAGE,
        _ => {
            let text = error.render().to_string();
            // The usage and the "try --help" follow an empty line; hints may be in between.
            let what = text.split("\n\nUsage:").next().unwrap_or(&text);
            let what = what
                .split("\n\nFor more information")
                .next()
                .unwrap_or(what);
            let what = what.strip_prefix("error: ").unwrap_or(what);
            return Err(Error::usage(what.replace("\n\n", "; ")).hint(usage_hint(error)));
        }
    };
    // The reader may have gone (`anykvm --help | head -1`): no reason to complain.
    let _ = error.print();
    Ok(code)
}

fn usage_hint(error: &clap::Error) -> &'static str {
    use clap::error::{ContextKind, ContextValue};
    let stray = matches!(
        error.get(ContextKind::InvalidArg),
        Some(ContextValue::String(text)) if !text.starts_with('-')
    );
    if error.kind() == ErrorKind::UnknownArgument && stray {
        "a command for the guest comes after '--', e.g. 'anykvm run -- uname -a'"
    } else {
        "see 'anykvm --help'"
    }
}

fn start_log(level: log::LevelFilter) {
    env_logger::Builder::new()
        .filter_level(level)
        .format(|out, record| {
            // A raw terminal does not return to the line's start by itself.
            let end = if terminal::is_raw() { "\r\n" } else { "\n" };
            let level = record.level().as_str().to_lowercase();
            write!(out, "anykvm: {level}: {}{end}", record.args())
        })
        .init();
}

fn check(json: bool) -> Result<u8, Error> {
    let report = Report::new(Facts::gather());
    let text = if json {
        serde_json::to_string_pretty(&report)
            .map_err(|e| Error::new(format!("cannot write JSON: {e}")))?
            + "\n"
    } else {
        report.text()
    };
    print(&text)?;
    Ok(if report.can_run { 0 } else { 1 })
}

fn fetch(args: &FetchArgs) -> Result<u8, Error> {
    let cache = Cache::of_user()?;
    let guest = cache.prepare(args.refresh, &Progress::new())?;
    if let Some(directory) = &args.export {
        run::export(&guest, directory)?;
    }
    print(&format!(
        "The default guest is ready: {} and {}. 'anykvm run' starts it, offline too.\n",
        guest.kernel_package, guest.userland_package
    ))?;
    Ok(0)
}

fn print(text: &str) -> Result<(), Error> {
    match std::io::stdout().write_all(text.as_bytes()) {
        Err(e) if e.kind() != std::io::ErrorKind::BrokenPipe => {
            Err(Error::new(format!("cannot write to standard output: {e}")))
        }
        _ => Ok(()),
    }
}
