//! A chat template.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mor::chat::{ChatTemplate, Message};

fuzz_target!(|source: &str| {
    let Ok(template) = ChatTemplate::new(source, "<s>".into(), "</s>".into()) else {
        return;
    };
    let messages = [
        ("system", "be nice"),
        ("user", "hi {{ x }}"),
        ("assistant", ""),
    ]
    .map(|(role, content)| Message { role, content });
    for count in [0, 2, 3] {
        let _ = template.render(&messages[..count], count == 2);
    }
});
