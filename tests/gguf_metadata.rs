//! Metadata: order, typed getters, and a file that the `gguf` package of PyPI wrote
//! (tools/golden/gguf_file.py).

mod common;

use mor::gguf::{Array, Gguf, Metadata, Value};
use mor::quant::{TensorType, dequantize_row};

#[test]
fn a_file_of_another_writer() {
    let bytes = common::data("gguf/pypi.gguf");
    let gguf = Gguf::parse(&bytes).unwrap();
    let wanted: [(&str, Value); 18] = [
        ("general.architecture", "mor".into()),
        ("t.u8", 200u8.into()),
        ("t.i8", (-100i8).into()),
        ("t.u16", 60000u16.into()),
        ("t.i16", (-30000i16).into()),
        ("t.u32", 4_000_000_000u32.into()),
        ("t.i32", (-2_000_000_000i32).into()),
        ("t.u64", (1u64 << 63).into()),
        ("t.i64", (-1i64 << 62).into()),
        ("t.f32", 0.5f32.into()),
        ("t.f64", 0.1f64.into()),
        ("t.bool", true.into()),
        ("t.string", "Grüße, 世界".into()),
        ("t.ints", vec![3i32, -1, 7].into()),
        ("t.floats", vec![0.5f32, -2.0].into()),
        ("t.bools", vec![true, false].into()),
        (
            "t.strings",
            vec!["a".to_owned(), String::new(), "ß".to_owned()].into(),
        ),
        ("general.alignment", 64u32.into()),
    ];
    for (found, wanted) in gguf.metadata.iter().zip(&wanted) {
        assert_eq!(found, (wanted.0, &wanted.1));
    }
    assert_eq!(gguf.metadata.len(), wanted.len());

    let tensor = |name: &str, ty, dims: &[u64], weights: Vec<f32>| {
        let t = gguf.tensor(name).unwrap();
        assert_eq!((t.ty, &t.dims[..]), (ty, dims), "{name}");
        assert!(t.offset.is_multiple_of(64), "{name}");
        let mut out = vec![f32::NAN; t.columns() * t.rows()];
        dequantize_row(ty, &bytes[t.offset..t.offset + t.bytes], &mut out).unwrap();
        assert_eq!(out, weights, "{name}");
    };
    let count = |n: u8| (0..n).map(f32::from).collect::<Vec<f32>>();
    tensor("f32", TensorType::F32, &[3, 2], count(6));
    tensor("f16", TensorType::F16, &[5], count(5));
    tensor("q6k", TensorType::Q6_K, &[256, 1], vec![0.0; 256]);
    let q8 = gguf.tensor("q8").unwrap();
    assert_eq!(
        (q8.ty, q8.columns(), q8.rows(), q8.bytes),
        (TensorType::Q8_0, 32, 2, 68)
    );
}

#[test]
fn order_is_kept() {
    let mut m = Metadata::new();
    assert!(m.is_empty());
    for key in ["c", "a", "b"] {
        assert_eq!(m.insert(key, key), None);
    }
    assert_eq!(m.insert("a", 1u8), Some(Value::from("a")));
    let keys = |m: &Metadata| m.iter().map(|(k, _)| k.to_owned()).collect::<Vec<_>>();
    assert_eq!(keys(&m), ["c", "a", "b"]);
    assert_eq!(m.remove("c"), Some(Value::from("c")));
    assert_eq!(m.remove("c"), None);
    assert_eq!(keys(&m), ["a", "b"]);
    assert_eq!(m.get("b"), Some(&Value::from("b")));
    assert_eq!(m.get("a"), Some(&Value::U8(1)));
    m.insert("c", 2u8);
    assert_eq!((keys(&m).join(""), m.len()), ("abc".to_owned(), 3));
}

#[test]
fn whole_numbers_of_any_type_that_fit() {
    let mut m = Metadata::new();
    let fit: [Value; 8] = [
        7u8.into(),
        7i8.into(),
        7u16.into(),
        7i16.into(),
        7u32.into(),
        7i32.into(),
        7u64.into(),
        7i64.into(),
    ];
    for value in fit {
        m.insert("k", value);
        assert_eq!(m.u32("k").unwrap(), Some(7));
    }
    m.insert("k", u32::MAX);
    assert_eq!(m.require_u32("k").unwrap(), u32::MAX);
    m.insert("k", 1u64 << 32);
    let text = m.u32("k").unwrap_err().to_string();
    assert!(
        text.contains("'k' should be a whole number from 0 to 4294967295, but is 4294967296"),
        "{text}"
    );
    m.insert("k", -1i8);
    assert!(m.u32("k").is_err());
}

#[test]
fn getters_name_the_key_and_both_types() {
    let mut m = Metadata::new();
    m.insert("s", "text");
    m.insert("f", 0.5f32);
    m.insert("d", 0.1f64);
    m.insert("b", true);
    m.insert("i", 3u8);
    m.insert("strings", vec!["x".to_owned()]);
    m.insert("u64s", vec![1u64, 2]);
    m.insert("large", vec![1i64 << 31]);
    m.insert("f32s", vec![0.5f32]);
    m.insert("f64s", vec![0.1f64]);

    assert_eq!(m.str("s").unwrap(), Some("text"));
    assert_eq!(
        (m.f32("f").unwrap(), m.f64("f").unwrap()),
        (Some(0.5), Some(0.5))
    );
    assert_eq!(
        (m.f32("d").unwrap(), m.f64("d").unwrap()),
        (Some(0.1), Some(0.1))
    );
    assert_eq!(m.bool("b").unwrap(), Some(true));
    assert!(m.strings("strings").unwrap().unwrap().iter().eq(["x"]));
    assert_eq!(m.i32s("u64s").unwrap().unwrap(), [1, 2]);
    assert_eq!(m.f32s("f64s").unwrap().unwrap(), [0.1]);
    assert_eq!(m.f64s("f32s").unwrap().unwrap(), [0.5]);

    let told = |e: mor::Error, parts: [&str; 2]| {
        let text = e.to_string();
        assert!(parts.iter().all(|p| text.contains(p)), "{text}");
    };
    told(
        m.u32("s").unwrap_err(),
        ["'s' should be a whole number", "is a string"],
    );
    told(m.str("i").unwrap_err(), ["'i' should be a string", "is 3"]);
    told(
        m.bool("i").unwrap_err(),
        ["'i' should be a boolean", "is 3"],
    );
    told(
        m.f32("i").unwrap_err(),
        ["'i' should be a floating-point number", "is 3"],
    );
    told(
        m.strings("s").unwrap_err(),
        ["'s' should be an array of strings", "is a string"],
    );
    told(
        m.strings("u64s").unwrap_err(),
        ["'u64s'", "is an array of whole numbers"],
    );
    told(
        m.i32s("large").unwrap_err(),
        ["'large'", "an array of 32-bit whole numbers"],
    );
    told(
        m.i32s("f32s").unwrap_err(),
        ["'f32s'", "is an array of floating-point numbers"],
    );
    told(
        m.f32s("strings").unwrap_err(),
        ["'strings'", "is an array of strings"],
    );
    told(
        m.require_str("none").unwrap_err(),
        ["lacks the key", "'none'"],
    );
    assert!(m.require_u32("none").is_err() && m.require_f32("none").is_err());
    assert!(m.require_bool("none").is_err() && m.require_strings("none").is_err());
    assert_eq!(m.u32("none").unwrap(), None);
    assert_eq!(Array::U8(vec![]).len(), 0);
    assert!(Array::U8(vec![]).is_empty());
}
