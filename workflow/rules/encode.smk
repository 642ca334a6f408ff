def shards(wildcards):
    """The shards of a split, known once the manifest is made."""
    images = checkpoints.manifest.get(dataset=wildcards.dataset).output[0]
    facts = read_facts(Path(images))
    return range(-(-facts["rows"][wildcards.split] // facts["layout"]["shard_size"]))


def shard_manifest(wildcards):
    """The views of a shard. Written by the manifest only when they change."""
    images = checkpoints.manifest.get(dataset=wildcards.dataset).output[0]
    path = Path(images).parent / wildcards.split / f"{wildcards.shard}.parquet"
    if not path.is_file():
        raise WorkflowError(f"{path} is missing: run again with --forcerun manifest")
    return str(path)


def weights(wildcards):
    """Digest of an encoder's own files; a tag of open_clip always means the same weights."""
    encoder = CONFIG.encoders[wildcards.encoder]
    place = Path(encoder.pretrained or encoder.model.removeprefix("local-dir:"))
    return digest(place) if place.exists() else "hub"


@one_line
def class_table(wildcards):
    """Class names with their aliases."""
    table = load_classes(Path(CONFIG.datasets[wildcards.dataset].classes))
    return [f"{name}: {aliases}" for name, aliases in zip(table.names, table.aliases)]


rule encode_text:
    output:
        TEXT,
    log:
        f"{LOGS}/encode_text/{{dataset}}/{{encoder}}.log",
    params:
        model=encoder_key("model"),
        pretrained=option("--pretrained", encoder_key("pretrained")),
        templates=option("--template", encoder_key("templates")),
        classes=dataset_key("classes"),
        table=class_table,
        weights=weights,
        code=code("encode"),
    shell:
        "cdul encode-text --classes {params.classes:q} --model {params.model:q} "
        "{params.pretrained:q} {params.templates:q} --output {output:q} 2> {log:q}"


rule encode:
    input:
        shard_manifest,
    output:
        shard=f"{EMBEDDINGS}/c/{{shard}}/0/0",
        table=ENCODED,
    log:
        f"{LOGS}/encode/{{dataset}}/{{encoder}}/{{split}}/{{shard}}.log",
    params:
        store=EMBEDDINGS,
        model=encoder_key("model"),
        pretrained=option("--pretrained", encoder_key("pretrained")),
        precision=encoder_key("precision"),
        resize_mode=option("--resize-mode", encoder_key("resize_mode")),
        max_pixels=dataset_key("max_pixels"),
        weights=weights,
        code=code("encode"),
    threads: 8
    resources:
        gpu=1,
        device=RUNTIME.device,
        batch_size=lambda wildcards, attempt: RUNTIME.batch_size // 2 ** (attempt - 1),
        workers=RUNTIME.workers,
    shell:
        "cdul encode --manifest {input:q} --store {params.store:q} --table {output.table:q} "
        "--model {params.model:q} {params.pretrained:q} --precision {params.precision} "
        "{params.resize_mode:q} --max-pixels {params.max_pixels} "
        "--device {resources.device} --batch-size {resources.batch_size} "
        "--workers={resources.workers} --threads {threads} 2> {log:q}"
