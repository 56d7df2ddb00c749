//! How a routed model weighs and selects, from the training configuration or the paper.

use super::document::Document;
use super::options::{Balancing, Gating, Kind, Overrides, Progress, RouterFunction, Selection};
use super::source::Source;
use super::spec::Spec;
use crate::error::{Error, Result};

/// A router's constants.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Router {
    /// Two matrices with a GELU between them, or one.
    pub mlp: bool,
    pub function: RouterFunction,
    pub alpha: f32,
    pub temperature: f32,
    pub gating: Gating,
    pub rule: Rule,
}

/// What only one of the two kinds of router has.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Rule {
    Expert {
        selection: Selection,
        /// Whether the auxiliary router has two matrices; of meaning for `aux_router` only.
        aux_mlp: bool,
        capacities: Vec<f64>,
    },
    Token {
        balancing: Balancing,
    },
}

/// The sigmoid's value at which a token goes on, as the auxiliary loss teaches it.
pub(super) const TRAINED_CUT: f32 = 0.5;
const DEFAULT_ALPHA: f32 = 0.1;

pub(super) fn resolve(
    source: &Source,
    spec: &Spec,
    training: &Document,
    overrides: &Overrides,
    progress: &mut dyn Progress,
) -> Result<Option<Router>> {
    if !matches!(spec.kind, Kind::Expert | Kind::Token) {
        let given = [
            ("alpha", overrides.alpha.is_some()),
            ("router function", overrides.router_function.is_some()),
            ("selection", overrides.selection.is_some()),
            ("balancing", overrides.balancing.is_some()),
            ("temperature", overrides.temperature.is_some()),
            ("gating", overrides.gating.is_some()),
            ("capacities", overrides.capacities.is_some()),
        ];
        return match given.iter().find(|(_, is_given)| *is_given) {
            None => Ok(None),
            Some((what, _)) => Err(Error::convert(format_args!(
                "a model of kind '{}' has no routers, to which the {what} that was given would belong; leave it out or give the kind",
                spec.kind.name()
            ))),
        };
    }
    if training.bool("mor.rand_router")? == Some(true) {
        return Err(Error::unsupported(
            "a model that routes at random (mor.rand_router)",
        ));
    }
    let section = format!("mor.{}", spec.kind.name());
    let function = function(spec.kind, training, &section, overrides, progress)?;
    let temperature = match overrides.temperature {
        Some(t) => Some(t),
        None => training.f32("mor.temp")?,
    };
    let router = Router {
        mlp: is_mlp(source, &format!("{}.mor_router", spec.router_layer(0))),
        function,
        alpha: alpha(spec.kind, function, training, &section, overrides, progress)?,
        temperature: temperature.unwrap_or_else(|| {
            progress.note("The router's temperature is not known; 1 is assumed.");
            1.0
        }),
        gating: gating(training, &section, overrides, progress)?,
        rule: match spec.kind {
            Kind::Token => Rule::Token {
                balancing: balancing(source, spec, training, overrides, progress)?,
            },
            _ => expert(source, spec, training, overrides, progress)?,
        },
    };
    if !(router.temperature.is_finite() && router.temperature > 0.0) {
        return Err(Error::convert(format_args!(
            "the router's temperature is {}; it must be above 0",
            router.temperature
        )));
    }
    if !router.alpha.is_finite() {
        return Err(Error::convert("the router's alpha is not a finite number"));
    }
    Ok(Some(router))
}

/// Whether the router below `prefix` has two matrices.
fn is_mlp(source: &Source, prefix: &str) -> bool {
    source.get(&format!("{prefix}.router.0.weight")).is_some()
}

fn function(
    kind: Kind,
    training: &Document,
    section: &str,
    overrides: &Overrides,
    progress: &mut dyn Progress,
) -> Result<RouterFunction> {
    let key = format!("{section}.router_func");
    let named = match overrides.router_function {
        Some(function) => Some(function),
        None => training.named(&key, RouterFunction::parse, "sigmoid, tanh, softmax, none")?,
    };
    let function = match named {
        Some(function) => function,
        // A key that is there and null means no function at all. For token-choice the authors' code takes the softmax
        // over the depths unless it says sigmoid.
        None if training.is_null(&key) && kind == Kind::Expert => RouterFunction::Identity,
        None if training.is_present() && kind == Kind::Token => RouterFunction::Softmax,
        None => {
            let assumed = match kind {
                Kind::Token => RouterFunction::Softmax,
                _ => RouterFunction::Sigmoid,
            };
            progress.note(&format!(
                "The router's function is not known; {} is assumed.",
                assumed.name()
            ));
            assumed
        }
    };
    let fits = match kind {
        Kind::Token => matches!(function, RouterFunction::Sigmoid | RouterFunction::Softmax),
        _ => function != RouterFunction::Softmax,
    };
    if fits {
        Ok(function)
    } else {
        Err(Error::convert(format_args!(
            "the router function '{}' is not one of {}-choice models",
            function.name(),
            kind.name()
        )))
    }
}

fn alpha(
    kind: Kind,
    function: RouterFunction,
    training: &Document,
    section: &str,
    overrides: &Overrides,
    progress: &mut dyn Progress,
) -> Result<f32> {
    // Without a function the score itself is the weight, whatever alpha says.
    if function == RouterFunction::Identity {
        return Ok(1.0);
    }
    let named = match overrides.alpha {
        Some(alpha) => Some(alpha),
        None => training.f32(&format!("{section}.alpha"))?,
    };
    Ok(named.unwrap_or_else(|| {
        let softmax = kind == Kind::Token && function == RouterFunction::Softmax;
        let alpha = if softmax { 1.0 } else { DEFAULT_ALPHA };
        progress.note(&format!(
            "The router's alpha is not known; {alpha} is assumed."
        ));
        alpha
    }))
}

fn gating(
    training: &Document,
    section: &str,
    overrides: &Overrides,
    progress: &mut dyn Progress,
) -> Result<Gating> {
    let key = format!("{section}.gating");
    if let Some(gating) = overrides.gating {
        return Ok(gating);
    }
    // The other of the two that the authors' configurations name: the weight is left out.
    if training.str(&key)? == Some("additive") {
        return Ok(Gating::None);
    }
    if let Some(gating) = training.named(&key, Gating::parse, "weighted, additive, none")? {
        return Ok(gating);
    }
    if training.is_null(&key) {
        return Ok(Gating::None);
    }
    progress.note("The router's gating is not known; weighted is assumed.");
    Ok(Gating::Weighted)
}

fn balancing(
    source: &Source,
    spec: &Spec,
    training: &Document,
    overrides: &Overrides,
    progress: &mut dyn Progress,
) -> Result<Balancing> {
    let named = match overrides.balancing {
        Some(balancing) => Some(balancing),
        None => training.named("mor.token.balancing", Balancing::parse, "loss, loss_free")?,
    };
    Ok(named.unwrap_or_else(|| {
        let bias = format!("{}.router_bias", spec.router_layer(0));
        let balancing = if source.get(&bias).is_some() {
            Balancing::LossFree
        } else {
            Balancing::Loss
        };
        progress.note(&format!(
            "From the tensors' names, the depths are taken to be balanced by '{}'.",
            balancing.name()
        ));
        balancing
    }))
}

fn expert(
    source: &Source,
    spec: &Spec,
    training: &Document,
    overrides: &Overrides,
    progress: &mut dyn Progress,
) -> Result<Rule> {
    let named = match overrides.selection {
        Some(selection) => Some(selection),
        None => training.named(
            "mor.expert.sampling",
            Selection::parse,
            "aux_loss, aux_router",
        )?,
    };
    let aux = format!("{}.mlp_router", spec.router_layer(0));
    let selection = named.unwrap_or_else(|| {
        let has_aux = is_mlp(source, &aux) || source.get(&format!("{aux}.router.weight")).is_some();
        let selection = if has_aux {
            Selection::AuxRouter
        } else {
            Selection::AuxLoss
        };
        progress.note(&format!(
            "From the tensors' names, tokens are taken to be selected by '{}'.",
            selection.name()
        ));
        selection
    });
    Ok(Rule::Expert {
        selection,
        aux_mlp: is_mlp(source, &aux),
        capacities: capacities(spec.recursions, training, overrides, progress)?,
    })
}

fn capacities(
    recursions: usize,
    training: &Document,
    overrides: &Overrides,
    progress: &mut dyn Progress,
) -> Result<Vec<f64>> {
    let named = match &overrides.capacities {
        Some(list) => Some(list.clone()),
        None => training.f64s("mor.capacity")?,
    };
    let mut list = named.unwrap_or_else(|| {
        progress.note("The capacities are not known; (N - i) / N is assumed for recursion i of N.");
        let n = recursions as f64;
        (0..recursions).map(|i| (n - i as f64) / n).collect()
    });
    if list.len() < recursions {
        return Err(Error::convert(format_args!(
            "{} capacities are given for {recursions} recursions; give one for each",
            list.len()
        )));
    }
    if list.len() > recursions {
        progress.note(&format!(
            "Of {} capacities only the first {recursions} have a recursion and are kept.",
            list.len()
        ));
        list.truncate(recursions);
    }
    if let Some(bad) = list.iter().find(|c| !(0.0..=1.0).contains(*c)) {
        return Err(Error::convert(format_args!(
            "a capacity is {bad}; each must be from 0 to 1"
        )));
    }
    Ok(list)
}
