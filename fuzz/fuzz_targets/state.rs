//! A saved session, of one of the models of the seeds: its first byte says which. What is compared before anything is
//! read (magic, size, fingerprint, checksum) is made right.
#![no_main]

#[path = "../session.rs"]
mod session;

use libfuzzer_sys::fuzz_target;
use mor::Model;
use session::{saved, session};
use std::sync::LazyLock;

static MODELS: LazyLock<Vec<Model>> = LazyLock::new(|| {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/seeds/models");
    let mut paths: Vec<_> = std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    paths.sort();
    paths
        .iter()
        .map(|path| Model::open(path).unwrap())
        .collect()
});

/// As in src/state.rs.
fn checksum(bytes: &[u8]) -> u64 {
    let (words, rest) = bytes.as_chunks::<8>();
    let words = words.iter().map(|word| u64::from_le_bytes(*word));
    let mut hash = 0xcbf2_9ce4_8422_2325u64;
    for number in words.chain(rest.iter().map(|byte| u64::from(*byte))) {
        hash = (hash ^ number).wrapping_mul(0x100_0000_01b3);
        hash ^= hash >> 32;
    }
    hash
}

fuzz_target!(|data: &[u8]| {
    // The parts before the tokens, and the checksum.
    if data.len() < 1 + 48 + 8 {
        return;
    }
    let model = &MODELS[usize::from(data[0]) % MODELS.len()];
    let mut session = session(model);
    let mut state = data[1..].to_vec();
    let body = state.len() - 8;
    let own = saved(&mut session);
    // Else all would be refused before anything is read.
    let (content, sum) = own.split_at(own.len() - 8);
    assert_eq!(checksum(content).to_le_bytes(), sum);
    state[..28].copy_from_slice(&own[..28]);
    state[8..16].copy_from_slice(&(body as u64 + 8).to_le_bytes());
    let sum = checksum(&state[..body]).to_le_bytes();
    state[body..].copy_from_slice(&sum);

    session.prefill(&[1, 2, 3]).unwrap();
    match session.restore(&state) {
        Ok(()) => {
            assert_eq!(saved(&mut session).len(), state.len());
            let length = session.tokens().len();
            for token in 0..3 {
                let _ = session.step(token);
            }
            session.rewind(length / 2).unwrap();
            // A key that is no number is an error of the step.
            let _ = session.step(1);
        }
        // Refused, it changes nothing.
        Err(_) => {
            assert_eq!(session.tokens(), [1, 2, 3]);
            session.step(1).unwrap();
        }
    }
});
