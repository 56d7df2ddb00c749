//! The alphabet of byte-level BPE: each byte is written as one printable character, so that a
//! vocabulary of any bytes can be kept as text. The printable bytes stand for themselves, the
//! other 68 are counted up from U+0100.

/// The byte that `character` stands for, if it belongs to the alphabet.
pub(super) fn byte_of(character: char) -> Option<u8> {
    let code = u32::from(character);
    let byte = match code {
        0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF => code,
        0x100..=0x120 => code - 0x100,
        0x121..=0x142 => code - 0x121 + 0x7F,
        0x143 => 0xAD,
        _ => return None,
    };
    u8::try_from(byte).ok()
}

/// Appends the bytes that `text` spells; false, with nothing appended, if a character is foreign.
/// The caller has reserved `text.len()` bytes: a character never decodes to more than it takes.
pub(super) fn decode_into(text: &str, out: &mut Vec<u8>) -> bool {
    let before = out.len();
    for character in text.chars() {
        match byte_of(character) {
            Some(byte) => out.push(byte),
            None => {
                out.truncate(before);
                return false;
            }
        }
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_has_one_character() {
        let mut seen = [0; 256];
        for code in 0..0x200 {
            if let Some(byte) = char::from_u32(code).and_then(byte_of) {
                seen[usize::from(byte)] += 1;
            }
        }
        assert_eq!(seen, [1; 256]);
    }

    #[test]
    fn known_characters() {
        assert_eq!(byte_of('Ġ'), Some(b' '));
        assert_eq!(byte_of('Ċ'), Some(b'\n'));
        assert_eq!(byte_of('ł'), Some(0xA0));
        assert_eq!(byte_of('ġ'), Some(0x7F));
        assert_eq!(byte_of('Ń'), Some(0xAD));
        assert_eq!(byte_of('a'), Some(b'a'));
        assert_eq!(byte_of(' '), None);
        assert_eq!(byte_of('ń'), None);
    }

    #[test]
    fn foreign_text_leaves_nothing_behind() {
        let mut out = b"x".to_vec();
        assert!(!decode_into("ab 漢", &mut out));
        assert_eq!(out, b"x");
        assert!(decode_into("Ġab", &mut out));
        assert_eq!(out, b"x ab");
    }
}
