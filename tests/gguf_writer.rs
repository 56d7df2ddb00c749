//! Files written here are read back equal; a writer that fails leaves nothing behind.

mod common;

use mor::Error;
use mor::gguf::{Array, Gguf, GgufWriter, Metadata, TensorPlan, Value, limits};
use mor::quant::TensorType;
use std::path::Path;

/// One value of every type.
fn metadata() -> Metadata {
    let mut m = Metadata::new();
    m.insert("general.architecture", "mor");
    m.insert("u8", u8::MAX);
    m.insert("i8", i8::MIN);
    m.insert("u16", u16::MAX);
    m.insert("i16", i16::MIN);
    m.insert("u32", u32::MAX);
    m.insert("i32", i32::MIN);
    m.insert("u64", u64::MAX);
    m.insert("i64", i64::MIN);
    m.insert("f32", 0.5f32);
    m.insert("f64", 0.1f64);
    m.insert("bool", true);
    m.insert("string", "Grüße\n世界".to_owned());
    m.insert("u8s", vec![1u8, 255]);
    m.insert("i8s", vec![-1i8]);
    m.insert("u16s", vec![7u16]);
    m.insert("i16s", vec![-7i16]);
    m.insert("u32s", vec![u32::MAX]);
    m.insert("i32s", vec![i32::MIN, 3]);
    m.insert("u64s", vec![u64::MAX]);
    m.insert("i64s", vec![i64::MIN]);
    m.insert("f32s", vec![-1.5f32, 2.0]);
    m.insert("f64s", vec![0.1f64]);
    m.insert("bools", vec![true, false]);
    m.insert("strings", vec!["a".to_owned(), String::new()]);
    m.insert("empty", Array::F64(vec![]));
    m
}

fn plan(name: &str, ty: TensorType, dims: &[u64]) -> TensorPlan {
    TensorPlan {
        name: name.into(),
        ty,
        dims: dims.to_vec(),
    }
}

fn entries(folder: &Path) -> usize {
    std::fs::read_dir(folder).unwrap().count()
}

#[track_caller]
fn refused(metadata: &Metadata, tensors: &[TensorPlan], sentence: &str) {
    let folder = tempfile::tempdir().unwrap();
    match GgufWriter::create(&folder.path().join("x.gguf"), metadata, tensors) {
        Err(Error::InvalidArgument(text)) if text.contains(sentence) => {}
        other => panic!("wanted '{sentence}', got {other:?}"),
    }
    assert_eq!(entries(folder.path()), 0);
}

#[test]
fn what_is_written_is_read_back() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    for alignment in [None, Some(1u32), Some(64), Some(4096)] {
        let mut metadata = metadata();
        if let Some(n) = alignment {
            metadata.insert("general.alignment", n);
        }
        let plans: Vec<TensorPlan> = TensorType::ALL
            .into_iter()
            .enumerate()
            .map(|(i, ty)| plan(&format!("t.{ty}"), ty, &[512, 1 + i as u64, 2][..1 + i % 3]))
            .collect();
        let mut writer = GgufWriter::create(&path, &metadata, &plans).unwrap();
        let mut random = common::Random(3);
        let mut written = Vec::new();
        for p in &plans {
            let rows: u64 = p.dims[1..].iter().product();
            let n = p.ty.row_bytes(512).unwrap() * rows as usize;
            let bytes: Vec<u8> = (0..n).map(|_| random.next() as u8).collect();
            let mut rest = &bytes[..];
            while !rest.is_empty() {
                let (piece, left) = rest.split_at(rest.len().min(1 + random.below(3000)));
                writer.write_tensor_bytes(piece).unwrap();
                rest = left;
            }
            writer.next_tensor().unwrap();
            written.push(bytes);
        }
        writer.finish().unwrap();
        assert_eq!(entries(folder.path()), 1, "a temporary file is left");

        let bytes = std::fs::read(&path).unwrap();
        let gguf = Gguf::parse(&bytes).unwrap();
        assert_eq!(gguf.metadata, metadata);
        assert_eq!(gguf.tensors().len(), plans.len());
        for ((t, p), data) in gguf.tensors().iter().zip(&plans).zip(&written) {
            assert_eq!((&t.name, t.ty, &t.dims), (&p.name, p.ty, &p.dims));
            assert!(t.offset.is_multiple_of(alignment.unwrap_or(32) as usize));
            assert_eq!(&bytes[t.offset..t.offset + t.bytes], &data[..]);
        }
        let end = gguf.tensors().last().map(|t| t.offset + t.bytes).unwrap();
        let aligned = end.next_multiple_of(alignment.unwrap_or(32) as usize);
        assert_eq!(bytes.len(), aligned, "the last tensor is padded too");
    }
}

#[test]
fn a_file_without_tensors() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("vocabulary.gguf");
    GgufWriter::create(&path, &metadata(), &[])
        .unwrap()
        .finish()
        .unwrap();
    let gguf = Gguf::parse(&std::fs::read(&path).unwrap()).unwrap();
    assert_eq!(gguf.metadata, metadata());
}

#[test]
fn the_target_changes_only_when_all_is_written() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    std::fs::write(&path, b"old").unwrap();
    let plans = [
        plan("a", TensorType::F32, &[2]),
        plan("b", TensorType::F32, &[1]),
    ];
    let create = || GgufWriter::create(&path, &Metadata::new(), &plans).unwrap();

    let writer = create();
    assert_eq!(entries(folder.path()), 2);
    drop(writer);
    assert_eq!(entries(folder.path()), 1);

    let mut writer = create();
    writer.write_tensor_bytes(&[0; 4]).unwrap();
    let text = writer.next_tensor().unwrap_err().to_string();
    assert!(text.contains("'a' has 8 bytes, but got 4"), "{text}");
    let text = writer.write_tensor_bytes(&[0; 5]).unwrap_err().to_string();
    assert!(text.contains("'a' has 8 bytes, but got 9"), "{text}");
    writer.write_tensor_bytes(&[0; 4]).unwrap();
    writer.next_tensor().unwrap();
    let text = writer.finish().unwrap_err().to_string();
    assert!(text.contains("'b' has 4 bytes, but got 0"), "{text}");

    let text = create().finish().unwrap_err().to_string();
    assert!(text.contains("'a' and those after it"), "{text}");
    assert_eq!(std::fs::read(&path).unwrap(), b"old");
    assert_eq!(entries(folder.path()), 1);

    // `finish` ends the last tensor by itself.
    let mut writer = create();
    writer.write_tensor_bytes(&[1; 8]).unwrap();
    writer.next_tensor().unwrap();
    writer.write_tensor_bytes(&[2; 4]).unwrap();
    writer.finish().unwrap();
    let gguf = Gguf::parse(&std::fs::read(&path).unwrap()).unwrap();
    assert_eq!(gguf.tensors().len(), 2);

    let mut writer = create();
    writer.write_tensor_bytes(&[1; 8]).unwrap();
    writer.next_tensor().unwrap();
    writer.write_tensor_bytes(&[2; 4]).unwrap();
    writer.next_tensor().unwrap();
    assert!(writer.next_tensor().is_err());
    assert!(writer.write_tensor_bytes(&[0]).is_err());
}

#[test]
fn two_writers_of_one_target_do_not_meet() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    let plans = [plan("a", TensorType::F32, &[1])];
    let mut first = GgufWriter::create(&path, &Metadata::new(), &plans).unwrap();
    let mut second = GgufWriter::create(&path, &Metadata::new(), &plans).unwrap();
    first.write_tensor_bytes(&[1; 4]).unwrap();
    second.write_tensor_bytes(&[2; 4]).unwrap();
    second.finish().unwrap();
    first.finish().unwrap();
    let bytes = std::fs::read(&path).unwrap();
    let at = Gguf::parse(&bytes).unwrap().tensors()[0].offset;
    assert_eq!(bytes[at..at + 4], [1; 4]);
}

#[test]
fn plans_that_would_not_be_read_are_refused() {
    let empty = Metadata::new();
    let f32 = |name: &str, dims: &[u64]| plan(name, TensorType::F32, dims);
    refused(&empty, &[f32("", &[1])], "has 0 bytes");
    refused(
        &empty,
        &[f32(&"n".repeat(64), &[1])],
        "has 64 bytes; 1 to 63",
    );
    refused(
        &empty,
        &[f32("w", &[1]), f32("w", &[1])],
        "'w' appears twice",
    );
    refused(&empty, &[f32("w", &[])], "'w' has 0 dimensions");
    refused(&empty, &[f32("w", &[1; 5])], "'w' has 5 dimensions");
    refused(&empty, &[f32("w", &[4, 0])], "a size of zero");
    refused(&empty, &[f32("w", &[1 << 40, 1 << 40])], "impossibly large");
    refused(
        &empty,
        &[f32("v", &[1 << 61]), f32("w", &[1 << 61])],
        "together are impossibly large",
    );
    refused(
        &empty,
        &[plan("w", TensorType::Q4_0, &[48])],
        "a multiple of 32",
    );

    let with = |key: &str, value: Value| {
        let mut m = Metadata::new();
        m.insert(key, value);
        m
    };
    refused(&with("", Value::U8(1)), &[], "a metadata key is empty");
    refused(
        &with(&"k".repeat(65536), Value::U8(1)),
        &[],
        "the limit is 65535",
    );
    let long = "x".repeat(limits::MAX_STRING_BYTES as usize + 1);
    refused(&with("k", long.clone().into()), &[], "a string of 'k'");
    refused(&with("k", vec![long].into()), &[], "a string of 'k'");
    let many = vec![0u8; limits::MAX_ARRAY_LEN as usize + 1];
    refused(&with("k", many.into()), &[], "the length of 'k'");
    refused(
        &with("general.alignment", Value::U64(32)),
        &[],
        "must be a U32",
    );
    refused(
        &with("general.alignment", Value::U32(24)),
        &[],
        "a power of two",
    );
}

#[test]
fn a_folder_that_does_not_exist() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("no/model.gguf");
    let e = GgufWriter::create(&path, &Metadata::new(), &[]).unwrap_err();
    assert!(matches!(e, Error::Io { path: p, .. } if *p == *path.display().to_string()));
}
