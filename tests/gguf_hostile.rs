//! GGUF files that lie, break off or ask for too much: each is refused with its own sentence,
//! nothing panics, and nothing large is allocated on a file's word.

mod common;

use common::allocator::{Allocator, here};
use common::raw::{File, Tensor, array, string};
use mor::Error;
use mor::gguf::{Gguf, limits};

#[global_allocator]
static ALLOCATOR: Allocator = Allocator;

/// Parses and checks that all allocations together stay within a small multiple of the file: the
/// worst is a map entry of about a hundred bytes for a pair of thirteen.
fn parse(bytes: &[u8]) -> Result<Gguf, Error> {
    let before = here().asked;
    let result = Gguf::parse(bytes);
    let asked = here().asked - before;
    let allowed = 16 * bytes.len() + 8192;
    assert!(
        asked <= allowed,
        "{asked} bytes for a file of {}",
        bytes.len()
    );
    result
}

#[track_caller]
fn damaged(bytes: &[u8], sentence: &str) {
    match parse(bytes) {
        Err(Error::Format(text)) if text.contains(sentence) => {}
        other => panic!("wanted '{sentence}', got {:?}", other.map(|_| "a model")),
    }
}

#[track_caller]
fn unsupported(bytes: &[u8], sentence: &str) {
    match parse(bytes) {
        Err(Error::Unsupported(text)) if text.contains(sentence) => {}
        other => panic!("wanted '{sentence}', got {:?}", other.map(|_| "a model")),
    }
}

/// F32, two rows of eight.
fn tensor(name: &str, offset: u64) -> Tensor {
    Tensor {
        name: name.into(),
        dims: vec![8, 2],
        ty: 0,
        offset,
    }
}

fn sound() -> File {
    File::default()
        .pair("general.architecture", 8, string(b"mor"))
        .pair("a.bool", 7, vec![1])
        .pair("a.number", 4, 7u32.to_le_bytes().to_vec())
        .pair("an.array", 9, array(5, 3, &[0; 12]))
        .pair(
            "some.strings",
            9,
            array(8, 2, &[string(b"x"), string("ß".as_bytes())].concat()),
        )
        .tensor(tensor("first", 0))
        .tensor(tensor("second", 64))
        .data(128)
}

#[test]
fn the_sound_file_parses() {
    let bytes = sound().bytes();
    let gguf = parse(&bytes).unwrap();
    assert_eq!(gguf.file_bytes, bytes.len());
    assert_eq!(gguf.metadata.len(), 5);
    let second = gguf.tensor("second").unwrap();
    assert_eq!((second.columns(), second.rows(), second.bytes), (8, 2, 64));
    assert_eq!(second.offset + 64, bytes.len());
    assert!(gguf.tensor("third").is_none());
    let mut version_2 = bytes.clone();
    version_2[4] = 2;
    assert_eq!(parse(&version_2).unwrap().tensors(), gguf.tensors());
    // A file of metadata alone is a file; it need not be padded.
    let gguf = parse(&File::default().bytes_without_padding()).unwrap();
    assert!(gguf.tensors().is_empty() && gguf.metadata.is_empty());
}

#[test]
fn truncated_at_every_byte() {
    let bytes = sound().bytes();
    for n in 0..bytes.len() {
        assert!(
            matches!(parse(&bytes[..n]), Err(Error::Format(_))),
            "{n} bytes parse"
        );
    }
}

#[test]
fn magic_and_version() {
    damaged(b"", "it ends inside the magic number");
    let mut bytes = sound().bytes();
    bytes[0] = b'g';
    damaged(&bytes, "does not begin with 'GGUF'");
    for (version, sentence) in [
        (0u32, "GGUF version 0"),
        (1, "GGUF version 1"),
        (4, "GGUF version 4"),
        (u32::MAX, "GGUF version 4294967295"),
        (3u32.swap_bytes(), "big-endian"),
        (2u32.swap_bytes(), "big-endian"),
    ] {
        let mut bytes = sound().bytes();
        bytes[4..8].copy_from_slice(&version.to_le_bytes());
        unsupported(&bytes, sentence);
    }
}

#[test]
fn counts_against_limits_and_the_rest_of_the_file() {
    for (at, noun, limit) in [
        (8, "the number of tensors", limits::MAX_TENSORS),
        (
            16,
            "the number of metadata entries",
            limits::MAX_METADATA_ENTRIES,
        ),
    ] {
        let mut bytes = sound().bytes();
        for n in [limit + 1, u64::MAX, 1 << 63] {
            bytes[at..at + 8].copy_from_slice(&n.to_le_bytes());
            damaged(&bytes, &format!("{noun} is {n}, but the limit is {limit}"));
        }
        bytes[at..at + 8].copy_from_slice(&limit.to_le_bytes());
        damaged(&bytes, &format!("{noun} is {limit}, more than the"));
    }
}

#[test]
fn string_lengths() {
    let length = |n: u64| {
        File::default()
            .pair("k", 8, n.to_le_bytes().to_vec())
            .data(64)
            .bytes()
    };
    let limit = limits::MAX_STRING_BYTES;
    damaged(
        &length(limit + 1),
        &format!(
            "the length of the value of 'k' is {}, but the limit",
            limit + 1
        ),
    );
    damaged(&length(u64::MAX), "but the limit is");
    damaged(&length(limit), "can hold");
    let mut key = sound().bytes();
    key[24..32].copy_from_slice(&(limits::MAX_KEY_BYTES + 1).to_le_bytes());
    damaged(
        &key,
        "the length of a metadata key is 65536, but the limit is 65535",
    );
}

#[test]
fn array_lengths_and_types() {
    let file = |value: Vec<u8>| File::default().pair("k", 9, value).data(64).bytes();
    let limit = limits::MAX_ARRAY_LEN;
    for element in [0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 11, 12] {
        damaged(&file(array(element, limit + 1, &[])), "but the limit is");
        damaged(&file(array(element, u64::MAX, &[])), "but the limit is");
        damaged(&file(array(element, limit, &[])), "can hold");
        parse(&file(array(element, 0, &[]))).unwrap();
    }
    unsupported(
        &file(array(9, 1, &array(0, 1, &[1]))),
        "the value of 'k' is an array of arrays",
    );
    damaged(&file(array(13, 1, &[])), "has type 13");
    damaged(&file(array(8, 1, &string(&[0xff]))), "not UTF-8");
    damaged(&file(array(7, 2, &[1, 2])), "neither 0 nor 1, but 2");
}

#[test]
fn metadata_pairs() {
    let one = |ty: u32, value: &[u8]| {
        File::default()
            .pair("k", ty, value.to_vec())
            .data(64)
            .bytes()
    };
    damaged(&one(13, &[0]), "has type 13, which GGUF does not define");
    damaged(&one(7, &[2]), "neither 0 nor 1");
    damaged(&one(8, &string(b"\xc3")), "the value of 'k' is not UTF-8");
    damaged(
        &sound().pair("a.bool", 7, vec![0]).bytes(),
        "the key 'a.bool' appears twice",
    );
    damaged(
        &sound().pair("", 7, vec![0]).bytes(),
        "a metadata key is empty",
    );
    let mut key = sound().bytes();
    key[32] = 0xff;
    damaged(&key, "a metadata key is not UTF-8");
    // What a file calls its keys is shown without control characters, and not at any length.
    let name = format!("\u{1b}[31m{}", "x".repeat(1000));
    let text = parse(&sound().pair(&name, 13, vec![]).bytes())
        .unwrap_err()
        .to_string();
    assert!(!text.contains('\u{1b}') && text.len() < 300, "{text}");
}

#[test]
fn tensor_shapes() {
    let shaped = |dims: &[u64], ty: u32| {
        let t = Tensor {
            name: "w".into(),
            dims: dims.to_vec(),
            ty,
            offset: 0,
        };
        File::default().tensor(t).data(4096).bytes()
    };
    damaged(&shaped(&[], 0), "the tensor 'w' has 0 dimensions");
    damaged(&shaped(&[1; 5], 0), "the tensor 'w' has 5 dimensions");
    damaged(&shaped(&[0], 0), "the tensor 'w' has a size of zero");
    damaged(&shaped(&[8, 0, 2], 0), "the tensor 'w' has a size of zero");
    damaged(
        &shaped(&[1 << 32, 1 << 32], 0),
        "the tensor 'w' is impossibly large",
    );
    damaged(
        &shaped(&[u64::MAX], 0),
        "the tensor 'w' is impossibly large",
    );
    damaged(&shaped(&[1 << 62], 0), "the tensor 'w' is impossibly large");
    damaged(
        &shaped(&[2, 1 << 31, 1 << 31, 2], 0),
        "the tensor 'w' is impossibly large",
    );
    damaged(
        &shaped(&[33], 8),
        "rows of 33 weights, but Q8_0 needs a multiple of 32",
    );
    damaged(
        &shaped(&[128, 2], 12),
        "rows of 128 weights, but Q4_K needs a multiple of 256",
    );
    unsupported(
        &shaped(&[256], 16),
        "the tensor 'w' has type IQ2_XXS; convert",
    );
    unsupported(
        &shaped(&[256], 999),
        "the tensor 'w' has type number 999; convert",
    );
    parse(&shaped(&[2, 2, 2, 2], 0)).unwrap();
}

#[test]
fn tensor_places() {
    let placed = |a: u64, b: u64| {
        let f = File::default()
            .tensor(tensor("a", a))
            .tensor(tensor("b", b));
        parse(&f.data(256).bytes())
    };
    let refused = |a, b, sentence: &str| {
        let text = placed(a, b).unwrap_err().to_string();
        assert!(text.contains(sentence), "{text}");
    };
    placed(0, 64).unwrap();
    placed(192, 32).unwrap(); // neither order nor density is asked for
    refused(0, 0, "the tensors 'a' and 'b' overlap");
    refused(0, 32, "the tensors 'a' and 'b' overlap");
    refused(96, 64, "the tensors 'b' and 'a' overlap");
    refused(
        0,
        65,
        "begins at 65, which is not a multiple of the alignment 32",
    );
    refused(0, 224, "the tensor 'b' reaches beyond the end");
    refused(u64::MAX - 31, 0, "the tensor 'a' reaches beyond the end");
    refused(1 << 63, 0, "the tensor 'a' reaches beyond the end");
}

#[test]
fn tensor_names() {
    let named = |names: &[&[u8]]| {
        let mut file = File::default();
        for (i, name) in names.iter().enumerate() {
            let t = tensor("", 64 * i as u64);
            file = file.tensor(Tensor {
                name: name.to_vec(),
                ..t
            });
        }
        file.data(256).bytes()
    };
    parse(&named(&[&[b'n'; 64]])).unwrap();
    damaged(
        &named(&[&[b'n'; 65]]),
        "the length of a tensor's name is 65, but the limit is 64",
    );
    damaged(&named(&[b"\xff\xfe"]), "a tensor's name is not UTF-8");
    damaged(&named(&[b"w", b"v", b"w"]), "the tensor 'w' appears twice");
}

#[test]
fn alignment() {
    let aligned = |ty: u32, value: &[u8]| {
        let f = File::default().pair("general.alignment", ty, value.to_vec());
        f.tensor(tensor("a", 0)).data(4096).bytes()
    };
    for n in [0, 3, 48, limits::MAX_ALIGNMENT * 2, u32::MAX] {
        damaged(
            &aligned(4, &n.to_le_bytes()),
            "'general.alignment' should be a power of two",
        );
    }
    damaged(&aligned(8, &string(b"32")), "should be a whole number");
    damaged(&aligned(5, &(-32i32).to_le_bytes()), "but is -32");
    damaged(
        &aligned(4, &limits::MAX_ALIGNMENT.to_le_bytes()),
        "reaches beyond the end",
    );
    for n in [1u32, 8, 512] {
        let gguf = parse(&aligned(4, &n.to_le_bytes())).unwrap();
        assert!(gguf.tensor("a").unwrap().offset.is_multiple_of(n as usize));
    }
}

/// Sound files with some bytes changed, cut or repeated: any answer but a panic, and what parses
/// keeps the promises of a parsed file.
#[test]
fn mutations() {
    let mut random = common::Random(23);
    let seeds = [sound().bytes(), common::data("gguf/pypi.gguf")];
    let mut parsed = 0;
    for round in 0..60_000 {
        let mut bytes = seeds[round % seeds.len()].clone();
        for _ in 0..1 + random.below(4) {
            mutate(&mut bytes, &mut random);
        }
        let Ok(gguf) = parse(&bytes) else { continue };
        parsed += 1;
        assert_eq!(gguf.file_bytes, bytes.len());
        for t in gguf.tensors() {
            assert!(
                t.offset
                    .checked_add(t.bytes)
                    .is_some_and(|end| end <= bytes.len())
            );
            assert_eq!(t.ty.row_bytes(t.columns()).unwrap() * t.rows(), t.bytes);
            assert_eq!(gguf.tensor(&t.name), Some(t));
        }
        for (key, value) in gguf.metadata.iter() {
            assert_eq!(
                gguf.metadata.get(key).map(|v| format!("{v:?}")),
                Some(format!("{value:?}"))
            );
        }
    }
    println!("{parsed} of 60000 parsed");
    assert!((1_000..59_000).contains(&parsed));
}

fn mutate(bytes: &mut Vec<u8>, random: &mut common::Random) {
    if bytes.is_empty() {
        return;
    }
    let at = random.below(bytes.len());
    match random.below(6) {
        0 => bytes[at] ^= 1 << random.below(8),
        1 => bytes[at] = random.next() as u8,
        2 => bytes[at] = [0, 1, 0x7f, 0x80, 0xff][random.below(5)],
        3 => bytes.truncate(at),
        4 => {
            // A length, count or offset of any magnitude.
            let n = (random.next() >> random.below(64)).to_le_bytes();
            let end = (at + 8).min(bytes.len());
            bytes[at..end].copy_from_slice(&n[..end - at]);
        }
        _ => {
            let end = (at + random.below(40)).min(bytes.len());
            let piece = bytes[at..end].to_vec();
            let to = random.below(bytes.len());
            bytes.splice(to..to, piece);
        }
    }
}
