//! `mor chat`: line by line, until the user ends it.

use crate::Result;
use crate::args::ChatArgs;
use crate::input;
use crate::interrupt::Interrupt;
use crate::run::{Output, Times, generate, prefill, sampler, summary};
use crate::terminal::{counted, one_line, tell};
use mor::chat::{ChatTemplate, Message};
use mor::generate::{Finish, GenerateParams};
use mor::tokenizer::EncodeOptions;
use mor::{Error, KvType, Model, Session, SessionParams, Tokenizer};
use rustyline::DefaultEditor;
use rustyline::config::{Behavior, Config};
use rustyline::error::ReadlineError;
use std::io::{ErrorKind, IsTerminal};

const HELP: &str = "\
/clear   forget the conversation and begin anew
/exit    end, as Ctrl-D does
/help    show this list
Ctrl-C   end the answer";

/// Talks, line by line.
pub fn chat(args: &ChatArgs) -> Result<()> {
    let model = input::open(args.model.as_deref(), args.engine.device)?;
    let mut chat = Chat::new(&model, args)?;
    let mut editor = editor()?;
    if std::io::stdin().is_terminal() {
        tell(format_args!("/help shows the commands"));
    }
    loop {
        let line = match editor.readline("> ") {
            Ok(line) => line,
            Err(ReadlineError::Eof) => return chat.end(),
            Err(ReadlineError::Interrupted) => return Ok(()),
            Err(ReadlineError::Io(error)) if error.kind() == ErrorKind::InvalidData => {
                tell(format_args!(
                    "mor: the line is no UTF-8 text and is skipped"
                ));
                chat.unanswered += 1;
                continue;
            }
            Err(error) => return Err(format!("cannot read a message: {error}").into()),
        };
        match line.trim() {
            "" => {}
            "/exit" => return chat.end(),
            "/help" => tell(format_args!("{HELP}")),
            "/clear" => chat.clear(),
            word if is_command(word) => tell(format_args!(
                "mor: there is no command {word}; /help shows those that there are"
            )),
            _ => {
                // History is a convenience; a line that it does not take is still answered.
                let _ = editor.add_history_entry(&line);
                chat.answer(line)?;
            }
        }
    }
}

/// Reads from standard input. Where that is a terminal and standard output is none, lines are typed on the terminal itself,
/// so that nothing but answers is written.
fn editor() -> Result<DefaultEditor> {
    let apart = std::io::stdin().is_terminal() && !std::io::stdout().is_terminal();
    let config = Config::builder().behavior(match apart {
        true => Behavior::PreferTerm,
        false => Behavior::Stdio,
    });
    Ok(DefaultEditor::with_config(config.build())?)
}

/// A slash and one word of letters: no message looks like that, but a path or a fraction may begin
/// with a slash.
fn is_command(line: &str) -> bool {
    let word = line.strip_prefix('/').unwrap_or_default();
    !word.is_empty() && word.chars().all(|c| c.is_ascii_lowercase())
}

/// A conversation.
struct Chat<'a> {
    args: &'a ChatArgs,
    tokenizer: &'a Tokenizer,
    template: ChatTemplate,
    session: Session,
    /// Who said what.
    turns: Vec<(&'static str, String)>,
    /// Lines that got no answer.
    unanswered: usize,
    interrupt: Interrupt,
}

impl<'a> Chat<'a> {
    fn new(model: &'a Model, args: &'a ChatArgs) -> Result<Self> {
        let tokenizer = model.tokenizer()?;
        let params = SessionParams {
            context: input::context(model, args.context)?,
            ..Default::default()
        };
        let mut session = input::session(model, &args.engine, KvType::F16, params)?;
        input::tell_of_context(&session);
        session.set_sampler(sampler(&args.sampling))?;
        let interrupt = Interrupt::new(session.canceller()?)?;
        let template = template(model, tokenizer)?;
        let mut chat = Chat {
            args,
            tokenizer,
            template,
            session,
            turns: Vec::new(),
            unanswered: 0,
            interrupt,
        };
        chat.clear();
        Ok(chat)
    }

    /// A program that wrote the messages, and cannot read what was told, learns that some had no answer.
    fn end(&self) -> Result<()> {
        if self.unanswered == 0 || std::io::stdin().is_terminal() {
            return Ok(());
        }
        let messages = counted(self.unanswered, "message");
        Err(format!("no answer was given to {messages}").into())
    }

    /// Forgets all but the first message that sets the tone.
    fn clear(&mut self) {
        self.turns.clear();
        let system = self.args.system.iter();
        self.turns
            .extend(system.map(|text| ("system", text.clone())));
    }

    /// Answers a message. What only this message is to blame for is told, and the message taken
    /// back.
    fn answer(&mut self, message: String) -> Result<()> {
        self.turns.push(("user", message));
        self.interrupt.arm();
        let answer = self.reply();
        self.interrupt.disarm();
        match answer {
            Ok(Some(text)) => {
                self.turns.push(("assistant", text));
                return Ok(());
            }
            Ok(None) => tell(format_args!(
                "mor: the model's chat template writes nothing for this message"
            )),
            Err(error) => match error.downcast_ref::<Error>() {
                Some(Error::Cancelled) => tell(format_args!("mor: the message is taken back")),
                Some(full @ (Error::ContextFull { .. } | Error::KvFull { .. })) => {
                    let talked = self.turns.iter().any(|(role, _)| *role == "assistant");
                    let anew = if talked { "/clear begins anew, " } else { "" };
                    tell(format_args!(
                        "mor: {full}; {anew}-c makes the context larger"
                    ));
                }
                Some(Error::Template(_)) => {
                    tell(format_args!("mor: {}", one_line(&error.to_string())));
                }
                _ => return Err(error),
            },
        }
        self.turns.pop();
        self.unanswered += 1;
        Ok(())
    }

    /// None where the template makes nothing of the messages.
    fn reply(&mut self) -> Result<Option<String>> {
        let turns = self.turns.iter();
        let messages: Vec<Message> = turns
            .map(|(role, content)| Message { role, content })
            .collect();
        let text = self.template.render(&messages, true)?;
        let options = EncodeOptions::CHAT;
        let tokens = self.tokenizer.encode(&text, options)?;
        if tokens.is_empty() {
            return Ok(None);
        }
        // What the session has already seen of it stays; at least one token must run.
        let same = self.session.tokens().iter().zip(&tokens);
        let seen = same.take_while(|(a, b)| a == b).count();
        let seen = seen.min(tokens.len().saturating_sub(1));
        self.session.rewind(seen)?;
        let mut times = Times::default();
        prefill(&mut self.session, &tokens[seen..], &mut times)?;
        let mut out = Output::new(self.args.depths);
        let params = GenerateParams {
            max_tokens: self.args.n,
            stop: &[],
        };
        let finish = generate(&mut self.session, &params, &mut out, &mut times)?;
        out.end_line()?;
        match finish {
            Finish::Cancelled => tell(format_args!("mor: the answer was ended")),
            Finish::ContextFull => tell(format_args!(
                "mor: the context is full; /clear begins anew, -c makes it larger"
            )),
            _ => {}
        }
        summary(&mut self.session, &times, self.args.depths);
        Ok(Some(out.text))
    }
}

/// The file's template; for a model that was never taught to chat, each message as a paragraph.
fn template(model: &Model, tokenizer: &Tokenizer) -> Result<ChatTemplate> {
    const PARAGRAPHS: &str = "{{ bos_token }}{% for message in messages %}{{ message.content }}{{ '\\n\\n' }}{% endfor %}";
    if let Some(template) = ChatTemplate::from_metadata(&model.gguf().metadata, tokenizer)? {
        return Ok(template);
    }
    tell(format_args!(
        "mor: the model has no chat template; each message is a paragraph that it continues"
    ));
    // As before every text of such a model.
    let bos = tokenizer.bos().filter(|_| tokenizer.add_bos());
    let bos = match bos {
        Some(id) => String::from_utf8_lossy(tokenizer.token_bytes(id, true)?).into_owned(),
        None => String::new(),
    };
    Ok(ChatTemplate::new(PARAGRAPHS, bos, String::new())?)
}
