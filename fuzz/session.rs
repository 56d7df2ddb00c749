//! Small sessions and what they save, for the seeds and for the target `state`.

use mor::{Model, Session, SessionParams};

pub fn session(model: &Model) -> Session {
    let params = SessionParams {
        context: 16,
        batch: 4,
        threads: 1,
        ..Default::default()
    };
    Session::new(model, &params).unwrap()
}

pub fn saved(session: &mut Session) -> Vec<u8> {
    let mut state = vec![0; session.save_bytes()];
    session.save(&mut state).unwrap();
    state
}
