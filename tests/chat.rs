//! Chat templates, compared with what Jinja2 makes of them. `tools/golden/chat.py` makes the data.
#![cfg(feature = "chat")]

use std::path::Path;

use mor::chat::{ChatTemplate, Message};
use serde_json::Value;

#[test]
fn as_jinja2() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/chat.json");
    let data: Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    let talks: Vec<Vec<(String, String)>> = serde_json::from_value(data["talks"].clone()).unwrap();
    let cases = data["cases"].as_array().unwrap();
    assert!(cases.len() >= 60);
    for case in cases {
        let source = data["templates"][case["template"].as_str().unwrap()].as_str();
        let template = ChatTemplate::new(source.unwrap(), "<s>".into(), "</s>".into()).unwrap();
        let talk = &talks[case["talk"].as_u64().unwrap() as usize];
        let messages: Vec<Message> = talk
            .iter()
            .map(|(role, content)| Message { role, content })
            .collect();
        let rendered = template.render(&messages, case["prompt"].as_bool().unwrap());
        assert_eq!(
            rendered.as_deref().ok(),
            case["text"].as_str(),
            "{case}: {rendered:?}"
        );
    }
}
