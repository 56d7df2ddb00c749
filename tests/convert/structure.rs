//! What the converter finds out by itself, and what it says when it cannot.

use mor::convert::{ConvertOptions, Kind, KvStrategy, Sharing};
use mor::quant::TensorType;
use std::path::Path;

use serde_json::json;

use crate::support::*;

/// The cases' heads are 8 wide, which nothing but config.json tells.
fn narrow_heads() -> ConvertOptions {
    let mut options = options(TensorType::F32);
    options.overrides.head_dim = Some(8);
    options
}

#[test]
fn without_documents_the_tensors_tell_the_structure() {
    for case in cases() {
        let mut options = narrow_heads();
        // Without an own last layer, layers that are stored once do not tell how often they run.
        let silent = ["recursive_cycle", "recursive_sequence"].contains(&case.as_str());
        if silent {
            let original = Checkpoint::read(&case);
            options.overrides.kind = Some(Kind::Recursive);
            options.overrides.sharing = Sharing::parse(original.sharing());
            options.overrides.recursions = Some(original.recursions() as u32);
        }
        let copy = Copy::of(&case).without("config.json").without("mor.yaml");
        let converted = copy.check(&case, &options);
        let metadata = &converted.gguf().metadata;
        assert_eq!(metadata.require_u32("mor.attention.head_count").unwrap(), 4);
        assert_eq!(
            metadata.require_u32("mor.attention.head_count_kv").unwrap(),
            2
        );
    }
}

#[test]
fn without_documents_the_papers_values_are_assumed_and_said() {
    let copy = Copy::of("expert_middle_cycle")
        .without("config.json")
        .without("mor.yaml");
    let converted = copy.convert(&narrow_heads()).unwrap();
    let m = converted.gguf().metadata;
    assert_eq!(m.require_str("mor.router.function").unwrap(), "sigmoid");
    assert_eq!(m.require_f32("mor.router.alpha").unwrap(), 0.1);
    assert_eq!(m.require_str("mor.router.selection").unwrap(), "aux_loss");
    assert_eq!(m.require_f32("mor.router.temperature").unwrap(), 1.0);
    assert_eq!(m.require_str("mor.router.gating").unwrap(), "weighted");
    assert_eq!(
        m.f64s("mor.router.capacities").unwrap(),
        Some(vec![1.0, 2.0 / 3.0, 1.0 / 3.0])
    );
    assert_eq!(m.require_f32("mor.rope.freq_base").unwrap(), 10000.0);
    assert_eq!(
        m.require_f32("mor.attention.layer_norm_rms_epsilon")
            .unwrap(),
        1e-5
    );
    let notes = converted.notes.join("\n");
    for word in [
        "function",
        "alpha",
        "temperature",
        "gating",
        "capacities",
        "selected",
        "rotary",
        "epsilon",
        "context",
        "sharing",
        "number of recursions",
        "KV",
        "'expert'",
    ] {
        assert!(notes.contains(word), "no note about {word} in\n{notes}");
    }
}

#[test]
fn heads_of_width_64_are_assumed_without_a_configuration() {
    let copy = Copy::of("expert_cycle").without("config.json");
    assert_eq!(
        copy.error(),
        "cannot convert: 'model.layers.0.block.0.self_attn.q_proj.weight' has 32 rows, which heads of width 64 do not divide; give the number of heads or head_dim"
    );
}

#[test]
fn training_values_reach_the_file() {
    let (bytes, _) = convert_case("expert_tanh", TensorType::F32);
    let m = mor::gguf::Gguf::parse(&bytes).unwrap().metadata;
    assert_eq!(m.require_str("mor.router.function").unwrap(), "tanh");
    let (bytes, _) = convert_case("token_unweighted", TensorType::F32);
    let m = mor::gguf::Gguf::parse(&bytes).unwrap().metadata;
    assert_eq!(m.require_str("mor.router.gating").unwrap(), "none");
    assert_eq!(m.require_str("mor.router.function").unwrap(), "softmax");
    let (bytes, _) = convert_case("token_kv_shared", TensorType::F32);
    let m = mor::gguf::Gguf::parse(&bytes).unwrap().metadata;
    assert_eq!(m.require_str("mor.kv.strategy").unwrap(), "shared");
}

#[test]
fn a_router_without_a_function_has_alpha_one() {
    let copy = Copy::of("expert_cycle");
    copy.replace_in("mor.yaml", "router_func: sigmoid", "router_func: null");
    let m = copy
        .convert(&options(TensorType::F32))
        .unwrap()
        .gguf()
        .metadata;
    assert_eq!(m.require_str("mor.router.function").unwrap(), "none");
    assert_eq!(m.require_f32("mor.router.alpha").unwrap(), 1.0);
}

/// Keys and values that recursions share where the authors' code lets them, and mor does not run it: refused, unless
/// the caller wants the other.
#[test]
fn kv_sharing_that_is_not_run_is_refused() {
    for (case, flag, instead) in [
        ("recursive_cycle", "enable", KvStrategy::RecursionWise),
        ("vanilla", "enable", KvStrategy::RecursionWise),
        ("expert_middle_cycle", "update_cache", KvStrategy::Shared),
    ] {
        let copy = Copy::of(case);
        for key in ["enable", "update_cache"] {
            let copied = std::fs::read_to_string(copy.path().join("mor.yaml")).unwrap();
            let off = format!("{key}: false");
            let at = copied.find("kv_sharing:").unwrap();
            let at = at + copied[at..].find(&off).unwrap();
            let mut changed = copied.clone();
            changed.replace_range(at..at + off.len(), &format!("{key}: true"));
            std::fs::write(copy.path().join("mor.yaml"), changed).unwrap();
            if key == flag {
                break;
            }
        }
        let error = copy.convert(&options(TensorType::F32)).unwrap_err();
        assert!(error.contains(&format!("kv_sharing.{flag}")), "{error}");
        let mut wanted = options(TensorType::F32);
        wanted.overrides.kv_strategy = Some(instead);
        let m = copy.convert(&wanted).unwrap().gguf().metadata;
        assert_eq!(m.require_str("mor.kv.strategy").unwrap(), instead.name());
    }
}

/// Whether keys and values are shared stands in config.json too, as the authors' trainer writes it.
#[test]
fn kv_sharing_is_read_from_config_json() {
    let copy = Copy::of("expert_kv_shared").without("mor.yaml");
    let told = copy.convert(&options(TensorType::F32)).unwrap();
    assert!(told.notes.concat().contains("whether KV is shared"));
    copy.replace_in(
        "config.json",
        "{",
        "{\"kv_sharing\": {\"enable\": true, \"update_cache\": false},",
    );
    let m = copy
        .check("expert_kv_shared", &options(TensorType::F32))
        .gguf()
        .metadata;
    assert_eq!(m.require_str("mor.kv.strategy").unwrap(), "shared");
}

/// What the authors' code takes where its configuration is silent, and its other word for no weight.
#[test]
fn silence_means_what_it_means_to_the_authors() {
    let copy = Copy::of("token_softmax");
    copy.replace_in("mor.yaml", "    router_func: softmax\n    alpha: 1.0\n", "");
    let m = copy
        .convert(&options(TensorType::F32))
        .unwrap()
        .gguf()
        .metadata;
    assert_eq!(m.require_str("mor.router.function").unwrap(), "softmax");
    assert_eq!(m.require_f32("mor.router.alpha").unwrap(), 1.0);
    let without = Copy::of("token_softmax")
        .without("mor.yaml")
        .without("config.json");
    let converted = without.convert(&narrow_heads()).unwrap();
    let m = converted.gguf().metadata;
    assert_eq!(m.require_str("mor.router.function").unwrap(), "softmax");
    assert!(converted.notes.concat().contains("softmax is assumed"));
    let copy = Copy::of("expert_middle_cycle");
    copy.replace_in("mor.yaml", "gating: weighted", "gating: additive");
    let m = copy
        .convert(&options(TensorType::F32))
        .unwrap()
        .gguf()
        .metadata;
    assert_eq!(m.require_str("mor.router.gating").unwrap(), "none");
    copy.replace_in("mor.yaml", "rand_router: false", "rand_router: true");
    assert!(copy.error().contains("at random"));
}

/// The configuration stays where the authors' scripts have it, named after the run.
#[test]
fn the_training_configuration_is_found_by_the_runs_name() {
    let case = "expert_tanh";
    let project = tempfile::tempdir().unwrap();
    let run = project.path().join("results/pretrain/250401_tanh");
    let checkpoint = run.join("checkpoint-100");
    std::fs::create_dir_all(&checkpoint).unwrap();
    let conf = project.path().join("conf/pretrain");
    std::fs::create_dir_all(&conf).unwrap();
    let yaml = case_folder(case).join("mor.yaml");
    for folder in [&run, &checkpoint] {
        for file in ["config.json", "model.safetensors"] {
            std::fs::copy(case_folder(case).join(file), folder.join(file)).unwrap();
        }
    }
    let function = |folder: &Path, options: &ConvertOptions| {
        let converted = convert_folder(folder, options).unwrap();
        let m = converted.gguf().metadata;
        m.require_str("mor.router.function").unwrap().to_string()
    };
    let plain = options(TensorType::F32);
    assert_eq!(function(&run, &plain), "sigmoid");
    let named = ConvertOptions {
        training: Some(yaml.clone()),
        ..options(TensorType::F32)
    };
    assert_eq!(function(&run, &named), "tanh");
    for place in [
        conf.join("250401_tanh.yaml"),
        run.parent().unwrap().join("250401_tanh.yaml"),
        run.join("250401_tanh.yaml"),
        run.join("mor.yml"),
    ] {
        std::fs::copy(&yaml, &place).unwrap();
        for folder in [&run, &checkpoint] {
            assert_eq!(function(folder, &plain), "tanh", "{}", place.display());
        }
        std::fs::remove_file(place).unwrap();
    }
    // A file of that name which is something else, or nothing sound.
    for text in ["name: 250401_tanh\nbackend: llama\n", "a: [\n"] {
        std::fs::write(run.join("250401_tanh.yaml"), text).unwrap();
        assert_eq!(function(&run, &plain), "sigmoid");
        std::fs::copy(&yaml, conf.join("250401_tanh.yaml")).unwrap();
        assert_eq!(function(&run, &plain), "tanh");
        std::fs::remove_file(conf.join("250401_tanh.yaml")).unwrap();
    }
    std::fs::remove_file(run.join("250401_tanh.yaml")).unwrap();
    // Results that lie elsewhere, as the authors' scripts link them.
    #[cfg(unix)]
    {
        let other = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink(project.path().join("results"), other.path().join("results"))
            .unwrap();
        std::fs::create_dir_all(other.path().join("conf/pretrain")).unwrap();
        std::fs::copy(&yaml, other.path().join("conf/pretrain/250401_tanh.yaml")).unwrap();
        assert_eq!(
            function(&other.path().join("results/pretrain/250401_tanh"), &plain),
            "tanh"
        );
    }
    let absent = ConvertOptions {
        training: Some(conf.join("no.yaml")),
        ..options(TensorType::F32)
    };
    assert!(
        convert_folder(&run, &absent)
            .unwrap_err()
            .contains("no.yaml")
    );
    // Without config.json, what the run changed of its base model's stands in there too.
    std::fs::remove_file(run.join("config.json")).unwrap();
    let text = std::fs::read_to_string(&yaml).unwrap();
    let more = format!("{text}\nmodel_config:\n  head_dim: 8\n  rope_theta: 777.0\n");
    std::fs::write(run.join("mor.yaml"), more).unwrap();
    let m = convert_folder(&run, &plain).unwrap().gguf().metadata;
    assert_eq!(m.require_u32("mor.attention.key_length").unwrap(), 8);
    assert_eq!(m.require_f32("mor.rope.freq_base").unwrap(), 777.0);
    // It says only in what the model differs.
    let eps = m
        .require_f32("mor.attention.layer_norm_rms_epsilon")
        .unwrap();
    assert_eq!(
        (eps, m.require_u32("mor.attention.head_count_kv").unwrap()),
        (1e-5, 2)
    );
}

/// Writes every recursion's layers out, as some training scripts do.
fn write_out_all_layers(copy: &mut Copy) {
    let c = &copy.checkpoint;
    let mut copies = Vec::new();
    for r in 1..c.recursions() {
        for j in 0..c.block() {
            let names = c.names(r, j);
            for (part, _) in PARTS {
                let own = format!("{}.{part}.weight", names[0]);
                let base = format!("{}.{part}.weight", names[1]);
                if !c.tensors.contains_key(&own) {
                    copies.push((own, c.tensors[&base].clone()));
                }
            }
        }
    }
    copy.checkpoint.tensors.extend(copies);
}

#[test]
fn layers_that_are_written_out_but_equal_collapse() {
    for case in cases() {
        let mut options = narrow_heads();
        options.overrides.name = Some("same".into());
        let mut original = Copy::of(&case);
        let plain = original.convert(&options).unwrap();
        write_out_all_layers(&mut original);
        let written_out = original.convert(&options).unwrap();
        assert!(plain.bytes == written_out.bytes, "{case}");
        // And without documents the copies themselves tell the structure.
        let mut silent = Copy::of(&case).without("config.json").without("mor.yaml");
        write_out_all_layers(&mut silent);
        let found = silent.check(&case, &options);
        assert_eq!(found.summary.tensors, plain.summary.tensors, "{case}");
    }
}

/// Which parts of a layer are meant.
type Choice = fn(&str) -> bool;

/// Sharing and recursions given, no documents: what is stored is taken at face value, whatever
/// deeper recursions have of their own.
#[test]
fn own_layers_of_deeper_recursions_are_found_without_documents() {
    for case in [
        "recursive_cycle",
        "recursive_sequence",
        "recursive_middle_cycle",
        "recursive_middle_sequence",
    ] {
        let original = Checkpoint::read(case);
        let mut options = narrow_heads();
        options.overrides.kind = Some(Kind::Recursive);
        options.overrides.sharing = Sharing::parse(original.sharing());
        options.overrides.recursions = Some(original.recursions() as u32);
        let parts: [(&str, Choice); 4] = [
            ("norms", |part| part.ends_with("layernorm")),
            ("attention", |part| part.starts_with("self_attn")),
            ("all but one", |part| part != "self_attn.q_proj"),
            ("all", |_| true),
        ];
        for (what, own) in parts {
            let mut copy = Copy::of(case).without("config.json").without("mor.yaml");
            write_out_all_layers(&mut copy);
            let c = &mut copy.checkpoint;
            for r in 1..original.recursions() {
                for j in 0..original.block() {
                    for (part, _) in PARTS {
                        let name = format!("{}.{part}.weight", original.names(r, j)[0]);
                        if !own(part) {
                            c.tensors.remove(&name);
                            continue;
                        }
                        // Another number for each, so that no two are equal.
                        let bytes = &mut c.tensors.get_mut(&name).unwrap().1;
                        let value = (r * 100 + j) as f32 / 1000.0;
                        bytes[..4].copy_from_slice(&value.to_le_bytes());
                    }
                }
            }
            let mut options = options.clone();
            // A cycle of layers that are all there and all different may as well be one recursion.
            if what == "all" && original.sharing() == "cycle" {
                let layers = original.config["num_hidden_layers"].as_u64().unwrap();
                options.overrides.layers = Some(layers as u32);
            }
            let converted = copy.convert(&options).unwrap();
            // The documents are still in the original, which says how to look tensors up.
            let checkpoint = Checkpoint {
                tensors: copy.checkpoint.tensors,
                ..Checkpoint::read(case)
            };
            let gguf = converted.gguf();
            check_every_tensor(case, &gguf, &converted.bytes, &checkpoint);
            let own_tensors = gguf.tensors().iter().filter(|t| t.name.contains(".rec."));
            let parts = PARTS.iter().filter(|(part, _)| own(part)).count();
            assert_eq!(
                own_tensors.count(),
                parts * (original.recursions() - 1) * original.block(),
                "{case}: {what}"
            );
        }
    }
}

#[test]
fn what_names_cannot_tell_is_asked_for() {
    let mut copy = Copy::of("recursive_cycle")
        .without("config.json")
        .without("mor.yaml");
    let mut options = narrow_heads();
    options.overrides.kind = Some(Kind::Recursive);
    let error = copy.convert(&options).unwrap_err();
    assert!(
        error.ends_with("do not show how they are shared; give the sharing and the number of recursions (--sharing, --recursions)"),
        "{error}"
    );
    // The first layer of the second recursion is whole, the others have parts only.
    let original = Checkpoint::read("recursive_cycle");
    options.overrides.sharing = Some(Sharing::Cycle);
    options.overrides.recursions = Some(original.recursions() as u32);
    write_out_all_layers(&mut copy);
    for r in 1..original.recursions() {
        for j in 0..original.block() {
            let name = format!("{}.mlp.up_proj.weight", original.names(r, j)[0]);
            if (r, j) != (1, 0) {
                copy.checkpoint.tensors.remove(&name);
            }
        }
    }
    let error = copy.convert(&options).unwrap_err();
    assert!(error.contains("give the number of layers"), "{error}");
    options.overrides.layers = Some(original.config["num_hidden_layers"].as_u64().unwrap() as u32);
    copy.check("recursive_cycle", &options);
}

#[test]
fn a_head_that_is_said_to_be_there_and_is_not_is_told() {
    let mut copy = Copy::of("vanilla");
    let untied = copy.convert(&options(TensorType::F32)).unwrap();
    let told = |c: &Converted| c.notes.iter().any(|n| n.contains("no lm_head.weight"));
    assert!(!told(&untied), "{:?}", untied.notes);
    copy.checkpoint.tensors.remove("lm_head.weight").unwrap();
    let tied = copy.convert(&options(TensorType::F32)).unwrap();
    assert!(told(&tied), "{:?}", tied.notes);
}

/// The least that a recursion takes is one token.
#[test]
fn a_capacity_may_be_0() {
    let copy = Copy::of("expert_middle_cycle");
    copy.replace_in("mor.yaml", "0.3333333333333333", "0.0");
    let converted = copy.convert(&options(TensorType::F32)).unwrap();
    let m = converted.gguf().metadata;
    let capacities = m.f64s("mor.router.capacities").unwrap().unwrap();
    assert_eq!(capacities[2], 0.0);
    mor::Model::from_bytes(converted.bytes).unwrap();
    copy.replace_in("mor.yaml", "1.0,0.6", "1.5,0.6");
    assert!(copy.error().contains("a capacity is 1.5"));
}

#[test]
fn a_tensor_of_another_recursion_becomes_an_alias() {
    let mut copy = Copy::of("expert_own_attention");
    let deep = "model.layers.3.block.1.self_attn.q_proj.weight";
    let mid = copy
        .tensor("model.layers.2.block.1.self_attn.q_proj.weight")
        .clone();
    *copy.tensor(deep) = mid.clone();
    let converted = copy.convert(&options(TensorType::F32)).unwrap();
    let gguf = converted.gguf();
    let aliases = gguf
        .metadata
        .strings("mor.recursion.aliases")
        .unwrap()
        .unwrap();
    let wanted = ["blk.2.rec.2.attn_q.weight=blk.2.rec.1.attn_q.weight"];
    assert!(aliases.iter().eq(wanted), "{aliases:?}");
    assert_eq!(converted.summary.aliases, 1);
    check_every_tensor("alias", &gguf, &converted.bytes, &copy.checkpoint);
}

#[test]
fn a_head_equal_to_the_embedding_is_stored_once() {
    let mut copy = Copy::of("vanilla");
    *copy.tensor("lm_head.weight") = copy.tensor("model.embed_tokens.weight").clone();
    let gguf = copy.convert(&options(TensorType::F32)).unwrap().gguf();
    assert!(gguf.tensor("output.weight").is_none());
}

#[test]
fn safetensors_shards_are_read_with_and_without_an_index() {
    let copy = Copy::of("recursive_middle_cycle");
    let names: Vec<&String> = copy.checkpoint.tensors.keys().collect();
    let mut map = serde_json::Map::new();
    for (number, part) in names.chunks(names.len().div_ceil(3)).enumerate() {
        let file = format!("model-{:05}-of-00003.safetensors", number + 1);
        let tensors = copy
            .checkpoint
            .tensors
            .iter()
            .filter(|(n, _)| part.contains(n));
        write_safetensors(&copy.path().join(&file), tensors);
        for name in part {
            map.insert((*name).clone(), file.clone().into());
        }
    }
    let check = || {
        let converted = convert_folder(copy.path(), &options(TensorType::F32)).unwrap();
        check_every_tensor(
            "shards",
            &converted.gguf(),
            &converted.bytes,
            &copy.checkpoint,
        );
    };
    check();
    let index = copy.path().join("model.safetensors.index.json");
    let document = serde_json::json!({ "weight_map": map });
    std::fs::write(&index, document.to_string()).unwrap();
    check();
    std::fs::write(&index, r#"{"weight_map": {"a": "../model.safetensors"}}"#).unwrap();
    assert_eq!(
        convert_folder(copy.path(), &options(TensorType::F32)).unwrap_err(),
        "cannot convert: 'model.safetensors.index.json' names the shard \"../model.safetensors\", which is not a plain file name"
    );
    std::fs::remove_file(index).unwrap();
    std::fs::remove_file(copy.path().join("model-00002-of-00003.safetensors")).unwrap();
    let error = convert_folder(copy.path(), &options(TensorType::F32)).unwrap_err();
    assert!(
        error.ends_with("holds 2 of 3 shards; add the missing ones"),
        "{error}"
    );
}

#[test]
fn what_is_wrong_with_a_checkpoint_is_said_in_one_sentence() {
    let mut copy = Copy::of("expert_middle_cycle");
    let name = "model.layers.1.block.1.mlp.up_proj.weight";
    let good = copy.tensor(name).clone();
    for bad in [f32::NAN, f32::INFINITY] {
        copy.tensor(name).1[40..44].copy_from_slice(&bad.to_le_bytes());
        assert_eq!(
            copy.error(),
            format!(
                "cannot convert: '{name}' cannot be stored: column 10 holds {bad}, which F32 cannot store; the weights are damaged"
            )
        );
    }
    *copy.tensor(name) = (vec![32, 64], good.1.clone());
    assert_eq!(
        copy.error(),
        format!(
            "cannot convert: '{name}' has shape [32, 64], but the model's configuration asks for [64, 32]"
        )
    );
    copy.checkpoint.tensors.remove(name);
    let folder = copy
        .path()
        .file_name()
        .unwrap()
        .to_str()
        .unwrap()
        .to_string();
    assert_eq!(
        copy.error(),
        format!("cannot convert: the tensor '{name}' is missing; it was looked for in {folder}")
    );
    copy.checkpoint.tensors.insert(name.into(), good.clone());
    copy.checkpoint.tensors.insert(
        "model.layers.1.block.0.self_attn.q_norm.weight".into(),
        (vec![8], vec![0; 32]),
    );
    assert_eq!(
        copy.error(),
        "cannot convert: the checkpoint holds 'model.layers.1.block.0.self_attn.q_norm.weight', which has no place in a model of kind 'expert' with 8 layers shared as middle_cycle by 3 recursions; check the training configuration, or say what it is (--kind, --sharing, --recursions)"
    );
}

#[test]
fn what_is_wrong_with_a_configuration_is_said_in_one_sentence() {
    let cases = [
        (
            "config.json",
            "\"silu\"",
            "\"gelu\"",
            "the activation 'gelu'",
        ),
        (
            "config.json",
            "\"num_hidden_layers\": 8",
            "\"num_hidden_layers\": 9",
            "9 layers cannot be shared as middle_cycle by 3 recursions",
        ),
        (
            "config.json",
            "\"num_hidden_layers\": 8",
            "\"num_hidden_layers\": 4000000000",
            "num_hidden_layers is 4000000000; it must be from 1 to 4096",
        ),
        (
            "mor.yaml",
            "num_recursion: 3",
            "num_recursion: 0",
            "num_recursion is 0; it must be from 1 to 4096",
        ),
        (
            "config.json",
            "\"max_position_embeddings\": 256",
            "\"max_position_embeddings\": 1000000000",
            "mor.context_length is 1000000000, more than the limit of 268435456, which this library does not run; check config.json",
        ),
        (
            "mor.yaml",
            "enable: true\n  type: expert",
            "enable: false\n  type: expert",
            "'model.layers.1.mor_router.router.weight', which has no place",
        ),
        (
            "config.json",
            "\"rms_norm_eps\": 1e-05",
            "\"rms_norm_eps\": \"x\"",
            "rms_norm_eps in 'config.json' is \"x\", not a finite number",
        ),
        ("config.json", "{", "[", "'config.json' is not sound JSON"),
        (
            "mor.yaml",
            "sharing: middle_cycle",
            "sharing: spiral",
            "recursive.sharing in 'mor.yaml' is 'spiral'",
        ),
        (
            "mor.yaml",
            "capacity: 1.0,0.6666666666666666,0.3333333333333333",
            "capacity: 1.0,0.5",
            "2 capacities are given for 3 recursions",
        ),
        (
            "mor.yaml",
            "type: expert",
            "type: token",
            "'model.layers.1.mor_router.router.weight' has shape [1, 32]",
        ),
        (
            "mor.yaml",
            "relaxation:\n  enable: false",
            "relaxation:\n  enable: true",
            "relaxation",
        ),
        (
            "mor.yaml",
            "temp: 1.0",
            "temp: 0",
            "the router's temperature is 0",
        ),
    ];
    for (file, from, to, sentence) in cases {
        let copy = Copy::of("expert_middle_cycle");
        copy.replace_in(file, from, to);
        let error = copy.error();
        assert!(error.contains(sentence), "{error}");
    }
}

#[test]
fn an_empty_folder_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let error = convert_folder(folder.path(), &options(TensorType::F32)).unwrap_err();
    assert!(
        error.ends_with("holds no model.safetensors, no pytorch_model.bin and no shards of either")
    );
}

#[test]
fn a_converted_file_requantizes_to_the_same_as_its_checkpoint() {
    for case in ["expert_aux_router", "token_loss_free", "vanilla"] {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("f32.gguf");
        std::fs::write(&path, convert_case(case, TensorType::F32).0).unwrap();
        for ty in [
            TensorType::F32,
            TensorType::BF16,
            TensorType::Q8_0,
            TensorType::Q4_0,
        ] {
            let again = convert_folder(&path, &options(ty)).unwrap();
            assert!(
                again.bytes == convert_case(case, ty).0,
                "{case} {}",
                ty.name()
            );
            assert_eq!(again.summary.architecture, "mor");
        }
    }
}

/// A tiny file of some architecture whose weights are all 1. Its norms and biases are in half
/// precision, which this library's own files never have.
fn foreign_file(path: &std::path::Path, architecture: &str) {
    use mor::gguf::{GgufWriter, Metadata, TensorPlan, Value};
    let mut metadata = Metadata::default();
    metadata.insert("general.architecture", Value::String(architecture.into()));
    metadata.insert("general.name", Value::String("tiny".into()));
    metadata.insert("general.file_type", Value::U32(1));
    for (key, value) in [
        ("block_count", 1),
        ("context_length", 8),
        ("embedding_length", 32),
        ("feed_forward_length", 64),
        ("attention.head_count", 2),
        ("vocab_size", 2),
    ] {
        metadata.insert(format!("{architecture}.{key}"), Value::U32(value));
    }
    let epsilon = format!("{architecture}.attention.layer_norm_rms_epsilon");
    metadata.insert(epsilon, Value::F32(1e-5));
    let plans = [
        ("token_embd.weight", vec![32u64, 2]),
        ("output_norm.weight", vec![32]),
        ("blk.0.attn_norm.weight", vec![32]),
        ("blk.0.attn_q.weight", vec![32, 32]),
        ("blk.0.attn_q.bias", vec![32]),
        ("blk.0.attn_k.weight", vec![32, 32]),
        ("blk.0.attn_v.weight", vec![32, 32]),
        ("blk.0.attn_output.weight", vec![32, 32]),
        ("blk.0.ffn_norm.weight", vec![32]),
        ("blk.0.ffn_gate.weight", vec![32, 64]),
        ("blk.0.ffn_up.weight", vec![32, 64]),
        ("blk.0.ffn_down.weight", vec![64, 32]),
    ]
    .map(|(name, dims)| TensorPlan {
        name: name.into(),
        ty: TensorType::F16,
        dims,
    });
    let mut writer = GgufWriter::create(path, &metadata, &plans).unwrap();
    for plan in &plans {
        let weights: u64 = plan.dims.iter().product();
        // 1.0 in half precision.
        let bytes = [0x00, 0x3c].repeat(weights as usize);
        writer.write_tensor_bytes(&bytes).unwrap();
        writer.next_tensor().unwrap();
    }
    writer.finish().unwrap();
}

#[test]
fn a_llama_file_keeps_its_metadata_and_its_architecture() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("llama.gguf");
    foreign_file(&path, "llama");
    let converted = convert_folder(&path, &options(TensorType::Q4_0)).unwrap();
    assert_eq!(converted.summary.architecture, "llama");
    let gguf = converted.gguf();
    assert_eq!(gguf.metadata.require_str("general.name").unwrap(), "tiny");
    assert_eq!(gguf.metadata.require_u32("general.file_type").unwrap(), 2);
    for tensor in gguf.tensors() {
        let wanted = match tensor.dims.len() {
            1 => TensorType::F32,
            _ => TensorType::Q4_0,
        };
        assert_eq!(tensor.ty, wanted, "{}", tensor.name);
    }
    assert!(decoded(&gguf, &converted.bytes, "token_embd.weight") == 1f32.to_le_bytes().repeat(64));
    let mut renamed = options(TensorType::F32);
    renamed.overrides.name = Some("other".into());
    let m = convert_folder(&path, &renamed).unwrap().gguf().metadata;
    assert_eq!(m.require_str("general.name").unwrap(), "other");
    renamed.overrides.alpha = Some(1.0);
    let error = convert_folder(&path, &renamed).unwrap_err();
    assert!(error.contains("only the name can be changed"), "{error}");
}

#[test]
fn other_architectures_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("gemma.gguf");
    foreign_file(&path, "gemma3");
    assert_eq!(
        convert_folder(&path, &options(TensorType::Q8_0)).unwrap_err(),
        "not supported: the file holds a model of architecture 'gemma3'; mor runs 'mor' and 'llama' files"
    );
}

#[test]
fn an_existing_output_survives_a_failure_and_is_replaced_by_success() {
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("out.gguf");
    std::fs::write(&output, b"precious").unwrap();
    let mut copy = Copy::of("vanilla");
    copy.tensor("model.norm.weight").1[..4].copy_from_slice(&f32::NAN.to_le_bytes());
    copy.checkpoint
        .write(&copy.path().join("model.safetensors"));
    let mut silent = mor::convert::Silent;
    let convert = |input: &std::path::Path, silent: &mut mor::convert::Silent| {
        mor::convert::convert(input, &output, &options(TensorType::F32), silent)
    };
    assert!(convert(copy.path(), &mut silent).is_err());
    assert_eq!(std::fs::read(&output).unwrap(), b"precious");
    assert!(convert(&case_folder("vanilla"), &mut silent).is_ok());
    // A file may even be converted onto itself: the old one stays mapped until the end.
    assert!(convert(&output, &mut silent).is_ok());
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
}

/// Another process with the same number, as in another container, has its own files in the same folder.
#[test]
fn files_of_another_writer_are_left_alone() {
    /// Looks what the hidden files in a folder are called while the writer is at work, but for those that hold this.
    struct Look<'a>(&'a std::path::Path, Vec<u32>);
    const ANOTHERS: &[u8] = b"another's";
    impl mor::convert::Progress for Look<'_> {
        fn start(&mut self, _: u64) {
            for entry in std::fs::read_dir(self.0).unwrap() {
                let path = entry.unwrap().path();
                let name = path.file_name().unwrap().to_str().unwrap();
                if let Some(name) = name.strip_suffix(".part")
                    && std::fs::read(&path).unwrap() != ANOTHERS
                {
                    let number = name.rsplit('-').next().unwrap();
                    self.1.push(number.parse().unwrap());
                }
            }
        }
    }
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("out.gguf");
    let convert = || {
        let mut look = Look(folder.path(), Vec::new());
        let from = case_folder("vanilla");
        mor::convert::convert(&from, &output, &options(TensorType::F32), &mut look).unwrap();
        look.1.into_iter().max().unwrap()
    };
    // The numbers that come next, other tests' conversions and all.
    let next = convert() + 1;
    let others = next..next + 500;
    for number in others.clone() {
        let name = format!(".mor-{}-{number}.part", std::process::id());
        std::fs::write(folder.path().join(name), ANOTHERS).unwrap();
    }
    assert!(!others.contains(&convert()));
    let files = std::fs::read_dir(folder.path()).unwrap();
    let kept = files.filter(|file| {
        let path = file.as_ref().unwrap().path();
        std::fs::read(path).unwrap() == ANOTHERS
    });
    assert_eq!(kept.count(), others.len());
}

/// A vanilla checkpoint whose config.json has these keys too, or others in their place.
fn with_config(more: serde_json::Value) -> Copy {
    let copy = Copy::of("vanilla");
    let path = copy.path().join("config.json");
    let text = std::fs::read_to_string(&path).unwrap();
    let mut config: serde_json::Value = serde_json::from_str(&text).unwrap();
    for (key, value) in more.as_object().unwrap() {
        config[key] = value.clone();
    }
    std::fs::write(path, config.to_string()).unwrap();
    copy
}

#[test]
fn rotary_scaling_is_taken_along() {
    let convert = |more| {
        with_config(more)
            .convert(&options(TensorType::F32))
            .unwrap()
    };
    // Both spellings of a table, one for all layers or for those of one type, which are all.
    for more in [
        json!({"rope_scaling": {"type": "linear", "factor": 4.0}}),
        json!({"rope_theta": 5.0, "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}}),
        json!({"rope_parameters": {"rope_type": "default"}, "rope_scaling": {"type": "linear", "factor": 4.0}}),
        json!({"rope_theta": null, "rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}}}),
    ] {
        let m = convert(more).gguf().metadata;
        assert_eq!(m.require_str("mor.rope.scaling.type").unwrap(), "linear");
        assert_eq!(m.require_f32("mor.rope.scaling.factor").unwrap(), 4.0);
        assert_eq!(m.require_f32("mor.rope.freq_base").unwrap(), 10000.0);
    }
    let llama3 = json!({"rope_scaling": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 1024,
    }});
    let converted = convert(llama3);
    assert!(
        !converted.notes.concat().contains("rotary"),
        "{:?}",
        converted.notes
    );
    let gguf = converted.gguf();
    let divisors: Vec<f32> = decoded(&gguf, &converted.bytes, "rope_freqs.weight")
        .chunks_exact(4)
        .map(|four| f32::from_le_bytes(four.try_into().unwrap()))
        .collect();
    // What transformers' _compute_llama3_parameters divides the frequencies of heads of 8 by.
    let expected = [1.0, 1.0, 3.239_642, 8.0];
    assert_eq!(divisors.len(), expected.len());
    for (divisor, expected) in divisors.iter().zip(expected) {
        assert!((divisor / expected - 1.0f32).abs() < 1e-6, "{divisors:?}");
    }
    // It runs, and not as without.
    let scores = |bytes: Vec<u8>| {
        let model = mor::Model::from_bytes(bytes).unwrap();
        let mut session = mor::Session::new(&model, &Default::default()).unwrap();
        session.prefill(&[1; 40]).unwrap();
        session.logits().unwrap().to_vec()
    };
    let plain = convert(json!({"rope_parameters": {"rope_type": "default"}}));
    assert_ne!(scores(converted.bytes.clone()), scores(plain.bytes.clone()));
    // An empty table says nothing.
    let empty = convert(json!({"rope_scaling": {}}));
    assert_eq!(scores(empty.bytes.clone()), scores(plain.bytes.clone()));
}

#[test]
fn what_config_json_asks_for_and_llama_does_not_do_is_refused() {
    for (more, phrase) in [
        (
            json!({"model_type": "smollm3"}),
            "a model of type 'smollm3'",
        ),
        (
            json!({"attention_multiplier": 0.015625}),
            "attention_multiplier",
        ),
        (json!({"logits_scaling": 8}), "logits_scaling"),
        (json!({"scale_emb": 12}), "scale_emb"),
        (json!({"no_rope_layers": [1, 1, 0]}), "no_rope_layers"),
        (
            json!({"layer_types": ["full_attention", "linear_attention"]}),
            "layer_types",
        ),
        (
            json!({"partial_rotary_factor": 0.5}),
            "partial_rotary_factor",
        ),
        (
            json!({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}),
            "partial_rotary_factor",
        ),
        (
            json!({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}),
            "type 'yarn'",
        ),
        (json!({"rope_scaling": {"factor": 4.0}}), "type 'unknown'"),
        (json!({"rope_scaling": 4.0}), "no table"),
        (
            json!({"rope_scaling": {"type": "linear"}}),
            "needs rope_scaling.factor",
        ),
        (
            json!({"rope_scaling": {"type": "llama3", "factor": 8.0}}),
            "needs rope_scaling.low_freq_factor",
        ),
        (
            json!({"rope_parameters": {"full_attention": {}, "sliding_attention": {}}}),
            "differ between layers",
        ),
    ] {
        let error = with_config(more.clone())
            .convert(&options(TensorType::F32))
            .unwrap_err();
        assert!(error.contains(phrase), "{more}: {error}");
    }
}

/// What asks for nothing, or for something that a shorter context makes the same.
#[test]
fn windows_of_attention_limit_the_context() {
    for (more, context) in [
        (json!({"sliding_window": 64}), 64),
        (
            json!({"sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"]}),
            64,
        ),
        (
            json!({"sliding_window": 64, "use_sliding_window": false}),
            256,
        ),
        (
            json!({"sliding_window": 4096, "logit_scale": 1.0, "model_type": "mistral"}),
            256,
        ),
        (
            json!({"sliding_window": null, "attention_multiplier": null}),
            256,
        ),
    ] {
        let converted = with_config(more.clone())
            .convert(&options(TensorType::F32))
            .unwrap();
        let m = converted.gguf().metadata;
        assert_eq!(
            m.require_u32("mor.context_length").unwrap(),
            context,
            "{more}"
        );
        assert_eq!(
            converted.notes.concat().contains("last 64 tokens"),
            context == 64
        );
    }
    let mut longer = options(TensorType::F32);
    longer.overrides.context_length = Some(200);
    let asked = with_config(json!({"sliding_window": 64}))
        .convert(&longer)
        .unwrap();
    assert_eq!(
        asked
            .gguf()
            .metadata
            .require_u32("mor.context_length")
            .unwrap(),
        200
    );
    let silent = with_config(json!({"rms_norm_eps": null}))
        .convert(&options(TensorType::F32))
        .unwrap();
    let m = silent.gguf().metadata;
    assert_eq!(
        m.require_f32("mor.attention.layer_norm_rms_epsilon")
            .unwrap(),
        1e-6
    );
}

/// A tensor with a place in no model, under a name that belongs to one.
#[test]
fn tensors_that_would_change_the_result_are_not_left_out() {
    for name in [
        "lm_head.bias",
        "model.norm.bias",
        "model.embed_tokens.scale",
    ] {
        let mut copy = Copy::of("vanilla");
        copy.add(name, (vec![4], vec![0; 16]));
        let error = copy.convert(&options(TensorType::F32)).unwrap_err();
        assert!(error.contains(name), "{error}");
    }
}
