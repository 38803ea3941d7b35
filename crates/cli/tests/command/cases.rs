//! What is checked.

use std::fs;

use super::Case;
use crate::harness::{Command, Installed, Who};

type Outcome = Result<(), String>;

fn always(_: &Installed) -> bool {
    true
}

macro_rules! cases {
    ($($name:ident $(if $runnable:expr)?;)*) => {
        &[$(Case {
            name: stringify!($name),
            runnable: cases!(@runnable $($runnable)?),
            check: $name,
        }),*]
    };
    (@runnable) => { always };
    (@runnable $runnable:expr) => { $runnable };
}

pub(crate) const ALL: &[Case] = cases! {
    every_step_of_the_probe_holds;
    a_failing_step_says_what_to_do_and_what_was_not_run;
    one_device_is_enough;
    a_device_with_all_address_bits_reaches_above_4_gib;
    locked_memory_is_limited;
    what_a_program_may_hold_is_limited;
    the_exit_status_is_the_programs;
    failures_of_its_own_have_their_statuses;
    bad_usage_is_explained;
    help_teaches;
    a_nested_run_is_refused;
    the_state_can_be_read;
    calls_are_summed_up;
    calls_are_logged_on_request;
    calls_are_shown_in_words;
    what_could_be_better_is_hinted_at;
    what_was_recorded_is_replayed;
    a_recording_that_fails_breaks_nothing;
    pairs_are_measured;
    a_trace_is_replayed_on_several_tables;
    what_is_wrong_with_a_trace_is_said;
    a_replay_is_drawn;
    a_picture_that_cannot_be_written_is_known_before_the_replay;
    replays_are_compared_and_the_numbers_are_those_of_the_json;
    pasids_are_played_with;
    a_storm_of_pasids_adds_up;
    the_doctor_is_content;
    a_static_program if |installed| installed.static_client.is_some();
    a_python_program if |installed| installed.python.is_some();
    many_clients_at_once;
    a_killed_client_leaves_nothing_and_disturbs_nobody;
    clients_killed_at_any_moment_leave_nothing;
};

/// The newcomer's first command.
fn every_step_of_the_probe_holds(command: &Command<'_>) -> Outcome {
    let ended = command.run(&["run"]).exits(0)?.prints(" 0 failed, 0 not run")?;
    let steps: Vec<_> = ended.output.lines().take_while(|line| !line.is_empty()).collect();
    if steps.len() < 30 || !steps.iter().all(|line| line.starts_with("ok   ")) {
        return Err(ended.report("lines other than ok"));
    }
    ended
        .prints("map it: 8 areas")?
        .prints("vfio0 cannot reach it")?
        .prints("vfio1 reaches its neighbours")?;

    let summary = command.script("exec \"$IOASID\" probe --json --size 3M").exits(0)?.json()?;
    let steps = summary["steps"].as_array().ok_or("no steps")?;
    if summary["failed"] != 0 || steps.iter().any(|step| step["status"] != "ok" || step["nanoseconds"] == 0) {
        return Err(summary.to_string());
    }
    Ok(())
}

fn a_failing_step_says_what_to_do_and_what_was_not_run(command: &Command<'_>) -> Outcome {
    let ended = command.script("exec \"$IOASID\" probe --size 1M --device /dev/vfio/devices/vfio7");
    ended
        .exits(1)?
        .prints("FAIL open vfio7\n     expected: an open file\n     happened: No such file")?
        .prints("--   attach vfio7: not run, because this failed: open vfio7")?
        .prints("To do first (open vfio7): ")?
        .prints("ok   map it")?;
    Ok(())
}

fn one_device_is_enough(command: &Command<'_>) -> Outcome {
    let ended = command.run(&["run", "--device", "edu:table=vtd"]).exits(0)?;
    ended.prints("open vfio1: not run, there is no second device")?.prints(" 0 failed, 1 not run")?;
    Ok(())
}

fn a_device_with_all_address_bits_reaches_above_4_gib(command: &Command<'_>) -> Outcome {
    for device in ["edu:dma-mask=64", "edu:dma-mask=40,table=vtd"] {
        command
            .run(&["run", "--device", device])
            .exits(0)?
            .prints("vfio0 above 4 GiB: the bytes of 0x104000064 are right")?;
    }
    command.run(&["run", "--device", "edu"]).exits(0)?.prints("above 4 GiB: it drives fewer address bits")?;
    Ok(())
}

/// As with a kernel's interface, whoever may not lock so much is refused, and can go on with less.
fn locked_memory_is_limited(command: &Command<'_>) -> Outcome {
    let limited = command.script("ulimit -l 1024 && exec \"$IOASID\" probe").exits(0)?;
    if command.who == Who::Tester && rustix::process::getuid().is_root() {
        // Its capability lifts the limit.
        limited.prints("charged: 1 GiB")?;
    } else {
        limited
            .prints("attach vfio0: refused rightly: 1 GiB is over this user's 1 MiB")?
            .prints("charged: 640 KiB")?;
    }
    Ok(())
}

fn what_a_program_may_hold_is_limited(command: &Command<'_>) -> Outcome {
    let open = ["cat", "/dev/iommu"];
    let refused = |arguments: &[&str]| {
        let arguments = [arguments, &["--limit", "files=0", "--"], &open].concat();
        command.run(&arguments).exits(1)?.complains("Too many open files")
    };
    refused(&["run"])?;
    let file = command.writable_file("nothing.csv").map_err(|error| error.to_string())?;
    refused(&["record", "--output", file.to_str().ok_or("the temporary directory's name is not text")?])?;
    let narrow = command.run(&["run", "--limit", "areas=0"]).exits(1)?;
    narrow.prints("Cannot allocate memory")?;
    command.run(&["run", "--limit", "files=some", "--", "true"]).exits(125)?.complains("files=some")?;
    Ok(())
}

fn the_exit_status_is_the_programs(command: &Command<'_>) -> Outcome {
    command.run(&["run", "--", "true"]).exits(0)?;
    command.run(&["run", "--", "false"]).exits(1)?;
    command.run(&["run", "false"]).exits(1)?;
    command.script("exit 7").exits(7)?;
    command.script("kill -9 $$").exits(128 + 9)?;
    command.script("kill -TERM $$").exits(128 + 15)?;
    Ok(())
}

fn failures_of_its_own_have_their_statuses(command: &Command<'_>) -> Outcome {
    let missing = command.run(&["run", "--", "/nonexistent/program"]).exits(127)?;
    missing.complains("/nonexistent/program")?.complains("check the name")?;
    command.run(&["run", "--", "no-program-has-this-name"]).exits(127)?;
    command.run(&["run", "--", "/etc/passwd"]).exits(126)?.complains("chmod +x")?;
    let unwritable = command.run(&["run", "--json", "/nonexistent/file", "--", "true"]).exits(125)?;
    unwritable.complains("cannot write /nonexistent/file")?;
    let many = ["--device", "edu"].repeat(40);
    command.run(&[&["run"], many.as_slice(), &["--", "true"]].concat()).exits(125)?.complains("--device")?;
    Ok(())
}

fn bad_usage_is_explained(command: &Command<'_>) -> Outcome {
    command.run(&["run", "--sumary", "--", "true"]).exits(125)?.complains("--summary")?;
    command.run(&["run", "--device", "ioat", "--", "true"]).exits(125)?.complains("there is \"edu\"")?;
    command.run(&["probe", "--size", "3"]).exits(2)?.complains("whole MiB")?;
    command.run(&["doctor", "--surely"]).exits(2)?;
    command.run(&[]).exits(2)?.complains("ioasid run")?;
    command.run_with(&["doctor"], &[("IOASID_LOG", "ioasid_run=loud")]).exits(2)?.complains("IOASID_LOG")?;
    Ok(())
}

fn help_teaches(command: &Command<'_>) -> Outcome {
    for subcommand in ["run", "record", "replay", "probe", "measure", "doctor"] {
        command.run(&[subcommand, "--help"]).exits(0)?.prints("Examples:")?.prints("Exit status:")?;
    }
    command.run(&["--help"]).exits(0)?.prints("ioasid doctor")?;
    command.run(&["--version"]).exits(0)?.prints(env!("CARGO_PKG_VERSION"))?;
    Ok(())
}

fn a_nested_run_is_refused(command: &Command<'_>) -> Outcome {
    let ended = command.script("\"$IOASID\" run -- true").exits(125)?;
    ended.complains("already runs under a seccomp filter")?.complains("ioasid doctor")?;
    let doctor = command.script("\"$IOASID\" doctor").exits(1)?;
    doctor.prints("missing  seccomp user notification")?;
    Ok(())
}

fn the_state_can_be_read(command: &Command<'_>) -> Outcome {
    let state = command.run(&["run", "--", "cat", "/dev/ioasid"]).exits(0)?.json()?;
    if state == serde_json::json!({ "contexts": [], "accounts": [], "not_listed": 0 }) {
        Ok(())
    } else {
        Err(state.to_string())
    }
}

fn calls_are_summed_up(command: &Command<'_>) -> Outcome {
    let file = command.writable_file("calls.json").map_err(|error| error.to_string())?;
    let path = file.to_str().ok_or("the temporary directory's name is not text")?;
    let script = "\"$IOASID\" probe --size 1M && exit 5";
    let ended = command.run(&["run", "--summary", "--json", path, "--", "sh", "-c", script]).exits(5)?;
    ended.complains("IOMMU_IOAS_MAP ")?.complains("VFIO_DEVICE_BIND_IOMMUFD ")?;
    let text = fs::read_to_string(&file).map_err(|error| error.to_string())?;
    let summary: serde_json::Value = serde_json::from_str(&text).map_err(|error| error.to_string())?;
    let calls = summary["calls"].as_array().ok_or("no calls")?;
    let map = calls.iter().find(|row| row["call"] == "IOMMU_IOAS_MAP").ok_or("no maps")?;
    let unmap = calls.iter().find(|row| row["call"] == "IOMMU_IOAS_UNMAP").ok_or("no unmaps")?;
    let right = summary["exit_status"] == 5
        && map["calls"].as_u64() >= Some(8)
        && map["mean_nanoseconds"].as_u64() > Some(0)
        && unmap["failed"] == 1;
    if right { Ok(()) } else { Err(text) }
}

fn calls_are_logged_on_request(command: &Command<'_>) -> Outcome {
    let probe = ["run", "--", "sh", "-c", "exec \"$IOASID\" probe --size 1M"];
    let quiet = command.run(&probe).exits(0)?;
    if !quiet.errors.is_empty() {
        return Err(quiet.report("nothing should be logged"));
    }
    command.run(&[&["-vv"], probe.as_slice()].concat()).exits(0)?.complains("Ioctl(3b81): Value(0)")?;
    command.run_with(&probe, &[("IOASID_LOG", "ioasid_run=debug")]).exits(0)?.complains("Ioctl(3b85)")?;
    Ok(())
}

fn calls_are_shown_in_words(command: &Command<'_>) -> Outcome {
    let script = "\"$IOASID\" probe --size 1M; exit 3";
    let ended = command.run(&["run", "--verbose", "--", "sh", "-c", script]).exits(3)?;
    let ended = ended
        .complains(" open /dev/iommu -> iommu1, ")?
        .complains(" iommu1 IOAS_ALLOC -> 0 ioas=1, ")?
        .complains(" iommu1 IOAS_MAP ioas=1 iova=0x4000000 len=0x")?
        .complains(" vfio0 VFIO_DEVICE_BIND_IOMMUFD iommufd=")?
        .complains(" vfio0 VFIO_DEVICE_ATTACH_IOMMUFD_PT pt=1 -> 0 hwpt=")?
        .complains("-> -1 ENOENT (No such file or directory), ")?
        .complains(" vfio0 pwrite region=0 offset=0x")?;
    // Before BIND the server does not look at arguments, and the probe tries one call then.
    if ended.errors.matches("arg=0x").count() > 1 {
        return Err(ended.report("a call was not decoded"));
    }
    let file = command.writable_file("calls.txt").map_err(|error| error.to_string())?;
    let option = format!("--verbose={}", file.display());
    let quiet = command.run(&["run", &option, "--", "sh", "-c", script]).exits(3)?;
    let text = fs::read_to_string(&file).map_err(|error| error.to_string())?;
    if !quiet.errors.is_empty() || !text.contains(" iommu1 IOAS_MAP ") {
        return Err(quiet.report(&text));
    }
    command
        .run(&["run", "--verbose=/nonexistent/file", "--", "true"])
        .exits(125)?
        .complains("cannot write")?;
    Ok(())
}

fn what_could_be_better_is_hinted_at(command: &Command<'_>) -> Outcome {
    let file = command.writable_file("hints.json").map_err(|error| error.to_string())?;
    let path = file.to_str().ok_or("the temporary directory's name is not text")?;
    let measure = ["--", "sh", "-c", "\"$IOASID\" measure --case pair --pairs 50; exit 4"];
    let ended = command.run(&[&["run", "--summary", "--json", path][..], &measure].concat()).exits(4)?;
    ended.complains("hint: ")?.complains("it could have stayed mapped")?.complains("p99")?;
    let text = fs::read_to_string(&file).map_err(|error| error.to_string())?;
    let summary: serde_json::Value = serde_json::from_str(&text).map_err(|error| error.to_string())?;
    let hints = summary["hints"].as_array().ok_or("no hints")?;
    if hints.len() != 1 || hints[0]["kind"] != "mapped-again" || hints[0]["calls"].as_u64() < Some(49) {
        return Err(text);
    }
    // Killed in the middle: what it had mapped is said.
    let victim = "\"$IOASID\" measure --case pair-device --pairs 100000000 & victim=$!
        until grep -q devices/vfio0 /dev/ioasid; do sleep 0.01; done
        kill -9 $victim; wait $victim; exit 0";
    let ended = command.run(&["run", "--summary", "--", "sh", "-c", victim]).exits(0)?;
    ended.complains("left at a last close: vfio0: attached to page table ")?;
    Ok(())
}

fn what_was_recorded_is_replayed(command: &Command<'_>) -> Outcome {
    for name in ["probe.csv", "probe.csv.zst"] {
        let file = command.writable_file(name).map_err(|error| error.to_string())?;
        let path = file.to_str().ok_or("the temporary directory's name is not text")?;
        let recorded = command.run(&["record", "--output", path]).exits(0)?.prints(" 0 failed, 0 not run")?;
        recorded.complains(" events recorded to ")?;
        let replay = [
            "replay",
            "--strict-input",
            "--table",
            "vtd",
            "--table",
            "riscv",
            "--threads",
            "2",
            "--json",
            path,
        ];
        let reports = command.run(&replay).exits(0)?.json()?;
        let right = reports.as_array().is_some_and(|all| {
            all.iter().all(|one| {
                let many = |field: &str, least: u64| one[field].as_u64() >= Some(least);
                one["devices"] == 2
                    && many("maps", 8)
                    && many("recorded_dma", 20)
                    && many("faults_as_recorded", 3)
                    && one["live_at_end"]["mappings"] == 0
            })
        });
        if !right {
            return Err(reports.to_string());
        }
    }
    Ok(())
}

fn a_recording_that_fails_breaks_nothing(command: &Command<'_>) -> Outcome {
    let full = command.run(&["record", "-o", "/dev/full", "--", "true"]).exits(125)?;
    full.complains("No space left on device")?;
    command
        .run(&["record", "-o", "-", "--", "true"])
        .exits(125)?
        .complains("standard output is the program's")?;
    command
        .run(&["record", "-o", "/nonexistent/x.csv", "--", "true"])
        .exits(125)?
        .complains("cannot write")?;
    let file = command.writable_file("status.csv").map_err(|error| error.to_string())?;
    let path = file.to_str().ok_or("the temporary directory's name is not text")?;
    command
        .run(&["record", "-o", path, "--", "sh", "-c", "exit 9"])
        .exits(9)?
        .complains("0 events recorded")?;
    command.run(&["record", "-o", path, "--", "/nonexistent/program"]).exits(127)?;
    command.run(&["record", "--", "true"]).exits(125)?.complains("--output")?;
    Ok(())
}

fn pairs_are_measured(command: &Command<'_>) -> Outcome {
    let measured = command.script("\"$IOASID\" measure --pairs 20 --json").exits(0)?.json()?;
    let cases = measured.as_array().ok_or("no cases")?;
    let names: Vec<_> = cases.iter().filter_map(|case| case["case"].as_str()).collect();
    let timed = cases.iter().all(|case| case["median_nanoseconds"].as_u64() > Some(0));
    if timed && names == ["refused", "pair", "pair-device", "pair-two-devices"] {
        Ok(())
    } else {
        Err(measured.to_string())
    }
}

/// The first events of a trace of the project, where every user can read them.
fn lines(command: &Command<'_>, name: &str, lines: &[&str]) -> Result<String, String> {
    let text: String = lines.iter().map(|line| format!("{line}\n")).collect();
    let file = command.writable_file(name).map_err(|error| error.to_string())?;
    fs::write(&file, text).map_err(|error| error.to_string())?;
    Ok(file.to_str().ok_or("the temporary directory's name is not text")?.to_owned())
}

const HEADER: &str = "t_ns,cpu,dev,op,iova,phys,bytes,dir";
const MAP: &str = "0,0,00:03.0,map,ffffa840,122595840,1522,BIDIRECTIONAL";
const UNMAP: &str = "70,1,00:03.0,unmap,ffffa840,-,1522,BIDIRECTIONAL";

fn a_trace_is_replayed_on_several_tables(command: &Command<'_>) -> Outcome {
    let path = lines(command, "good.csv", &[HEADER, MAP, UNMAP])?;
    let two = ["replay", "--table", "vtd", "--table", "riscv", "--mode", "deferred", "--threads", "2", &path];
    let ended = command.run(&two).exits(0)?;
    let ended = ended.prints("good.csv: vtd table, deferred, 2 threads, 1 device\n  2 events in ")?;
    let ended = ended.prints("good.csv: sv48 table, deferred")?.prints("every byte right")?;
    if ended.output.contains('\x1b') || !ended.errors.is_empty() {
        return Err(ended.report("colours or a progress bar where there is no terminal"));
    }
    let replayed = command.run(&[&two[..], &["--json"]].concat()).exits(0)?.json()?;
    let right = replayed.as_array().is_some_and(|all| {
        all.iter().all(|one| one["maps"] == 1 && one["unmap"]["count"] == 1 && one["dma_bytes"] == 3044)
    });
    if !right || replayed[1]["table"] != "sv48" || replayed[0]["trace"] != path.as_str() {
        return Err(replayed.to_string());
    }
    let against = ["replay", "--against", "btree", "--against", "vm-memory", "--mode", "deferred", &path];
    let ended = command.run(&against).exits(0)?.prints("good.csv: native table, deferred, 1 thread")?;
    let ended = ended.prints("good.csv: btree in place of a space, strict")?;
    ended.prints("good.csv: vm-memory in place of a space, strict")?;
    let replayed = command.run(&[&against[..], &["--json"]].concat()).exits(0)?.json()?;
    let (ours, peer) = (&replayed[0], &replayed[2]);
    if ours["iotlb_walks"] != 1 || !peer["iotlb_hit_rate"].is_null() || peer["dma_bytes"] != 3044 {
        return Err(replayed.to_string());
    }
    command
        .run(&["run", "--", "sh", "-c", "\"$IOASID\" replay --json - < \"$0\"", &path])
        .exits(0)?
        .prints("\"trace\": \"-\"")?;
    Ok(())
}

fn pasids_are_played_with(command: &Command<'_>) -> Outcome {
    let play = [
        "limit host 2",
        "set guest --owner machine:7 --quota 10 --limit host",
        "allocate guest --spid 5",
        "bind guest 0",
        "free guest 0 # parked",
        "allocate guest --spid 5",
        "allocate guest",
        "show",
        "unbind 0",
        "allocate guest",
    ];
    let script = lines(command, "pasids", &play)?;
    command
        .run(&["pasid", "play", &script])
        .exits(0)?
        .prints("free guest 0: parked until it is let go")?
        .prints("event 2: free 0 of machine 7, private ID 5")?
        .prints("refused: limit \"host\" of 2 IDs is reached")?
        .prints("0: freepending, held 1 times")?
        .prints("unbind 0: done\n  event 4: unbind 0 of machine 7\nallocate guest: 0\n")?;
    let script = lines(command, "pasid-nonsense", &["# nothing", "limit host", "allocate guest --first x"])?;
    command.run(&["pasid", "play", &script]).exits(1)?.complains("line 3: ")?;
    command.run(&["pasid", "play", "/nowhere"]).exits(1)?.complains("cannot open /nowhere")?;
    command.run(&["pasid", "play", "--capacity", "0"]).exits(2)?;
    Ok(())
}

fn a_storm_of_pasids_adds_up(command: &Command<'_>) -> Outcome {
    let storm = ["pasid", "storm", "--machines", "5", "--calls", "2000", "--quota", "50"];
    command.run(&storm).exits(0)?.prints("all right; nothing is left")?;
    let report = command.run(&[&storm[..], &["--json"]].concat()).exits(0)?.json()?;
    if report["calls"] != 40_000 || report["refused"] == 0 {
        return Err(report.to_string());
    }
    Ok(())
}

fn what_is_wrong_with_a_trace_is_said(command: &Command<'_>) -> Outcome {
    let path = lines(command, "bad.csv", &[HEADER, UNMAP, MAP, "70,1"])?;
    let ended = command.run(&["replay", &path]).exits(0)?.prints("1 line left out: no events")?;
    ended.prints("line 4: 2 fields where there should be 8")?.prints("nothing mapped: 1")?;
    command.run(&["replay", "--strict-input", &path]).exits(1)?.complains("line 2: an unmap of")?;
    let none = lines(command, "none.csv", &["%PDF-1.7"])?;
    command.run(&["replay", &none]).exits(1)?.complains("none.csv: this is no trace: line 1")?;
    command.run(&["replay", "/nonexistent"]).exits(1)?.complains("/nonexistent: cannot open it")?;
    let refused = "0,0,00:03.0,map,fee00000,1000,4096,TO_DEVICE";
    let refused = lines(command, "refused.csv", &[HEADER, refused])?;
    command.run(&["replay", &refused]).exits(1)?.prints("WRONG          maps or unmaps refused: 1")?;
    command.run(&["replay"]).exits(2)?;
    command.run(&["replay", "--table", "arm", &path]).exits(2)?.complains("amdv1")?;
    command.run(&["replay", "--against", "array", &path]).exits(2)?.complains("btree or vm-memory")?;
    command.run(&["replay", "--against", "btree", "-"]).exits(2)?.complains("read once")?;
    command.run(&["replay", "--mode", "lazy", &path]).exits(2)?.complains("strict or deferred")?;
    command.run(&["replay", "--threads", "0", &path]).exits(2)?.complains("1..=256")?;
    command.run(&["replay", "--table", "vtd", "--table", "vtd57", "-"]).exits(2)?.complains("read once")?;
    Ok(())
}

/// A trace of two events, and a file for a picture that is not there yet, in a directory of this user's.
fn with_directory(
    command: &Command<'_>,
    name: &str,
    work: impl FnOnce(&str, &std::path::Path) -> Outcome,
) -> Outcome {
    let trace = lines(command, &format!("{name}.csv"), &[HEADER, MAP, UNMAP])?;
    let directory = command.writable_directory(name).map_err(|error| error.to_string())?;
    let outcome = work(&trace, &directory);
    fs::remove_dir_all(&directory).map_err(|error| error.to_string())?;
    outcome
}

fn a_replay_is_drawn(command: &Command<'_>) -> Outcome {
    with_directory(command, "drawn", |trace, directory| {
        let path = directory.join("one.svg");
        let file = path.to_str().ok_or("the temporary directory's name is not text")?;
        let drawn = || fs::read_to_string(&path).map_err(|error| error.to_string());
        let ended = command.run(&["replay", "--plot", file, "--table", "vtd", trace]).exits(0)?;
        ended.prints("every byte right")?;
        let picture = drawn()?;
        for words in ["<svg xmlns=", "<title>", "vtd table, strict, 1 thread, 1 device; 2 events", "</svg>"] {
            if !picture.contains(words) {
                return Err(format!("{words} is not in {picture}"));
            }
        }
        // What was there is replaced whole, however long it was.
        fs::write(&path, "old ".repeat(100_000)).map_err(|error| error.to_string())?;
        let compare = ["replay", "--compare", "--table", "native", "--table", "riscv", "--mode", "deferred"];
        command.run(&[&compare[..], &["--plot", file, trace, trace]].concat()).exits(0)?;
        let picture = drawn()?;
        if !picture.starts_with("<svg")
            || !picture.ends_with("</svg>\n")
            || !picture.contains("sv48 deferred")
        {
            return Err(picture);
        }
        // A pipe has no end to cut off.
        command
            .run(&[
                "run",
                "--",
                "sh",
                "-c",
                "\"$IOASID\" replay --plot /dev/stdout --json \"$0\" | cat",
                trace,
            ])
            .exits(0)?
            .prints("</svg>")?;
        Ok(())
    })
}

fn a_picture_that_cannot_be_written_is_known_before_the_replay(command: &Command<'_>) -> Outcome {
    with_directory(command, "not-drawn", |trace, directory| {
        let nowhere = "/nonexistent/one.svg";
        let ended = command.run(&["replay", "--plot", nowhere, trace]).exits(1)?;
        let ended = ended.complains("cannot write /nonexistent/one.svg: No such file")?;
        if !ended.output.is_empty() {
            return Err(ended.report("the trace was replayed"));
        }
        command.run(&["replay", "--plot", "/proc", trace]).exits(1)?.complains("cannot write /proc: ")?;
        command
            .run(&["replay", "--plot", "-", trace])
            .exits(2)?
            .complains("standard output is for the report")?;
        command.run(&["replay", "--plot", "one.png", trace]).exits(2)?.complains("pictures are SVG")?;
        let several = ["replay", "--table", "vtd", "--table", "native", "--plot", "one.svg", trace];
        command.run(&several).exits(2)?.complains("add --compare")?;
        // After a replay that came to nothing there is no empty file, and an old picture stays.
        let path = directory.join("none.svg");
        let file = path.to_str().ok_or("the temporary directory's name is not text")?;
        command.run(&["replay", "--plot", file, "/nonexistent"]).exits(1)?;
        if path.exists() {
            return Err("an empty picture was left behind".to_owned());
        }
        command.run(&["replay", "--plot", file, trace]).exits(0)?;
        let before = fs::read(&path).map_err(|error| error.to_string())?;
        command.run(&["replay", "--plot", file, "/nonexistent"]).exits(1)?;
        let after = fs::read(&path).map_err(|error| error.to_string())?;
        if before.is_empty() || before != after { Err("the old picture is gone".to_owned()) } else { Ok(()) }
    })
}

fn replays_are_compared_and_the_numbers_are_those_of_the_json(command: &Command<'_>) -> Outcome {
    let path = lines(command, "compared.csv", &[HEADER, MAP, UNMAP])?;
    let ended = command.run(&["replay", "--compare", &path]).exits(0)?;
    let rows: Vec<_> =
        ended.output.lines().skip(2).filter_map(|line| line.trim().split("  ").next()).collect();
    let choices = ["native", "vtd", "amdv1", "x86-64", "sv48"];
    let expected: Vec<_> = choices
        .iter()
        .flat_map(|table| ["strict", "deferred"].map(|mode| format!("{table} {mode}")))
        .collect();
    if rows != expected {
        return Err(ended.report("not one row for each table and mode"));
    }
    ended.prints("compared.csv: 2 events, 1 thread\n")?.prints("map p50")?;
    let compared =
        command.run(&["replay", "--compare", "--mode", "strict", "--json", &path]).exits(0)?.json()?;
    let compared = compared.as_array().ok_or("no list")?;
    let tables: Vec<_> = compared.iter().map(|one| one["table"].as_str().unwrap_or_default()).collect();
    if tables != choices || compared.iter().any(|one| one["mode"] != "strict") {
        return Err(format!("{tables:?}"));
    }
    // The parts say the same as the whole: a map, an unmap, and DMA in both directions.
    for one in compared {
        let course = &one["course"];
        let (live, histogram) = (course["live"].as_array(), one["histogram"].as_array());
        let most =
            live.and_then(|steps| steps.iter().map(|step| step["most_mappings"].as_u64()).max().flatten());
        let maps = |name: &str| -> Option<u64> { histogram?.iter().map(|bin| bin[name].as_u64()).sum() };
        let counted = (maps("maps"), maps("unmaps"), maps("dma")) == (Some(1), Some(1), Some(2));
        if most != one["peak"]["mappings"].as_u64() || !counted || course["latency"][0]["map"]["count"] != 1 {
            return Err(one.to_string());
        }
    }
    let wrong = "0,0,00:03.0,map,fee00000,1000,4096,TO_DEVICE";
    let wrong = lines(command, "wrong.csv", &[HEADER, wrong])?;
    let ended =
        command.run(&["replay", "--compare", "--table", "vtd", "--mode", "strict", &wrong]).exits(1)?;
    ended.prints("maps or unmaps refused: 1")?.prints("  WRONG\n")?;
    Ok(())
}

fn the_doctor_is_content(command: &Command<'_>) -> Outcome {
    let ended = command.run(&["doctor"]).exits(0)?.prints("seccomp user notification")?;
    if ended.output.contains('\x1b') {
        return Err(ended.report("colours where there is no terminal"));
    }
    let findings = command.run(&["doctor", "--json"]).exits(0)?.json()?;
    let findings = findings.as_array().ok_or("no findings")?;
    let named = findings.iter().any(|finding| finding["name"] == "kernel" && finding["state"] == "ok");
    if named { Ok(()) } else { Err("nothing is said about the kernel".to_owned()) }
}

fn a_static_program(command: &Command<'_>) -> Outcome {
    let client = command.installed.static_client.as_deref().ok_or("it was not built")?;
    let client = client.to_str().ok_or("the temporary directory's name is not text")?;
    command.run(&["run", "--", client]).exits(0)?.prints("the C client's bytes are right")?;
    Ok(())
}

fn a_python_program(command: &Command<'_>) -> Outcome {
    let (python, script) = command.python_client().ok_or("Python is not here")?;
    let python = python.to_str().ok_or("Python's path is not text")?;
    command.run(&["run", "--", python, "-c", script]).exits(0)?.prints("the Python client is content")?;
    Ok(())
}

fn many_clients_at_once(command: &Command<'_>) -> Outcome {
    let script = r#"
        for number in 1 2 3 4 5; do
            "$IOASID" measure --case pair --pairs 500 & clients="$clients $!"
        done
        "$IOASID" probe --size 64M || exit 2
        for client in $clients; do wait $client || exit 3; done"#;
    command.script(script).exits(0)?.prints(" 0 failed, 0 not run")?;
    Ok(())
}

/// The victim is in a loop of maps and unmaps with the device attached when it is killed.
fn a_killed_client_leaves_nothing_and_disturbs_nobody(command: &Command<'_>) -> Outcome {
    let script = r#"
        "$IOASID" measure --case pair-device --pairs 100000000 & victim=$!
        "$IOASID" measure --case pair --pairs 5000 & neighbour=$!
        until grep -q devices/vfio0 /dev/ioasid; do sleep 0.01; done
        sleep 0.2
        kill -9 $victim
        wait $victim
        test $? = 137 || exit 2
        "$IOASID" probe --size 8M || exit 3
        wait $neighbour || exit 4
        cat /dev/ioasid"#;
    let ended = command.script(script).exits(0)?.prints(" 0 failed, 0 not run")?;
    ended.prints("\"contexts\": []")?;
    Ok(())
}

fn clients_killed_at_any_moment_leave_nothing(command: &Command<'_>) -> Outcome {
    let script = r#"
        for delay in 001 002 003 004 005 006 007 008 010 012 015 020 025 030 040; do
            "$IOASID" probe > /dev/null & victim=$!
            sleep 0.$delay
            kill -9 $victim
            wait $victim
        done
        "$IOASID" probe --size 8M || exit 2
        cat /dev/ioasid"#;
    let ended = command.script(script).exits(0)?.prints("\"contexts\": []")?;
    if ended.output.matches("\"charged_pages\": 0,").count()
        == ended.output.matches("\"charged_pages\"").count()
    {
        Ok(())
    } else {
        Err(ended.report("something is still charged"))
    }
}
