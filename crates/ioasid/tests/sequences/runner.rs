//! Running a property, for a moment or for hours.
//!
//! By itself each test draws some cases from a seed of the moment. `IOASID_SEQUENCES_SEED` names the seed,
//! `IOASID_SEQUENCES_CASES` how many cases there shall be, in percent of the usual, and `IOASID_SEQUENCES_ONLY` the one property;
//! `cargo xtask sequences` sets them, again and again. A case that fails is shrunk, and reported with what brings it back.
//!
//! One test runs at a time, because the bound on table memory is the process's.

use proptest::strategy::Strategy;
use proptest::test_runner::{Config, RngAlgorithm, TestCaseError, TestError, TestRng, TestRunner};
use std::cell::RefCell;
use std::fmt::Debug;
use std::panic::{self, AssertUnwindSafe};
use std::sync::{Mutex, Once, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

static ALONE: Mutex<()> = Mutex::new(());

thread_local! {
    /// What the last panic of the thread said, and where; `None`: panics are printed as ever.
    static PANIC: RefCell<Option<String>> = const { RefCell::new(None) };
}

/// Panics of the properties are kept, not printed: shrinking makes hundreds of them.
fn keep_panics() {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let usual = panic::take_hook();
        panic::set_hook(Box::new(move |panic| {
            let kept = PANIC.with_borrow_mut(|kept| kept.as_mut().map(|kept| *kept = panic.to_string()));
            if kept.is_none() {
                usual(panic);
            }
        }));
    });
}

fn number(variable: &str) -> Option<u64> {
    let value = std::env::var(variable).ok()?;
    Some(value.parse().unwrap_or_else(|_| panic!("{variable} is {value:?}, which is no number")))
}

/// Runs a property on cases of a strategy.
pub(crate) fn run<S: Strategy>(name: &str, cases: u32, strategy: S, property: impl Fn(S::Value))
where
    S::Value: Debug,
{
    if std::env::var("IOASID_SEQUENCES_ONLY").is_ok_and(|only| only != name) {
        return;
    }
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    keep_panics();
    let now = || SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.as_nanos() as u64 >> 10);
    let seed = number("IOASID_SEQUENCES_SEED").unwrap_or_else(now);
    let percent = number("IOASID_SEQUENCES_CASES").unwrap_or(100);
    let cases = u32::try_from((u64::from(cases) * percent / 100).max(1)).unwrap_or(u32::MAX);

    let mut bytes = [0; 32];
    bytes[..8].copy_from_slice(&seed.to_le_bytes());
    bytes.iter_mut().skip(8).zip(name.bytes()).for_each(|(byte, letter)| *byte = letter);
    let config = Config {
        cases,
        max_shrink_iters: 3000,
        max_shrink_time: 120_000,
        failure_persistence: None,
        ..Config::default()
    };
    let mut runner = TestRunner::new_with_rng(config, TestRng::from_seed(RngAlgorithm::ChaCha, &bytes));
    let result = runner.run(&strategy, |value| {
        PANIC.set(Some(String::new()));
        let run = panic::catch_unwind(AssertUnwindSafe(|| property(value)));
        let said = PANIC.take().unwrap_or_default();
        run.map_err(|panic| {
            // A thread that the property has started keeps nothing here, but what it said is handed on.
            let handed = panic.downcast_ref::<String>().cloned();
            TestCaseError::fail(if said.is_empty() { handed.unwrap_or_default() } else { said })
        })
    });
    match result {
        Ok(()) => {}
        Err(TestError::Abort(reason)) => panic!("{name}, seed {seed}: no cases: {reason}"),
        Err(TestError::Fail(reason, smallest)) => panic!(
            "{reason}\n\nof {name}, which fails for\n{smallest:#?}\n\n\
             again: cargo xtask sequences --seed {seed} --rounds 1 --only {name} --cases {percent}"
        ),
    }
}
