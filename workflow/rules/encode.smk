rule encode_text:
    output:
        TEXT,
    log:
        f"{LOGS}/encode_text/{{dataset}}/{{encoder}}.log",
    benchmark:
        f"{BENCHMARKS}/encode_text/{{dataset}}/{{encoder}}.tsv"
    params:
        model=encoder_key("model"),
        pretrained=option("--pretrained", encoder_key("pretrained")),
        templates=option("--template", encoder_key("templates")),
        aliases=text_options,
        classes=dataset_key("classes"),
        table=class_table,
        weights=encoder_weights,
        code=code("encode", "encode_text"),
    shell:
        "cdul encode-text --classes {params.classes:q} --model {params.model:q} "
        "{params.pretrained:q} {params.templates:q} {params.aliases} --output {output:q} 2> {log:q}"


rule encode:
    input:
        shard_manifest,
    output:
        shard=f"{EMBEDDINGS}/c/{{shard}}/0/0",
        table=ENCODED,
    log:
        f"{LOGS}/encode/{{dataset}}/{{encoder}}/{{split}}/{{shard}}.log",
    benchmark:
        f"{BENCHMARKS}/encode/{{dataset}}/{{encoder}}/{{split}}/{{shard}}.tsv"
    group:
        submission("encode")
    threads: 8
    resources:
        gpu=gpus,
        device=RUNTIME.device,
        engine=RUNTIME.engine,
        batch_size=lambda wildcards, attempt: RUNTIME.batch_size // 2 ** (attempt - 1),
        workers=RUNTIME.workers,
    params:
        store=subpath(output.shard, ancestor=4),
        model=encoder_key("model"),
        pretrained=option("--pretrained", encoder_key("pretrained")),
        precision=encoder_key("precision"),
        input_mode=input_mode,
        max_pixels=dataset_key("max_pixels"),
        weights=encoder_weights,
        code=code("encode", "encode_shard"),
    shell:
        "cdul encode --manifest {input:q} --store {params.store:q} --table {output.table:q} "
        "--model {params.model:q} {params.pretrained:q} --precision {params.precision} "
        "{params.input_mode:q} --max-pixels {params.max_pixels} "
        "--device {resources.device:q} --gpus {resources.gpu} --engine {resources.engine} "
        "--batch-size {resources.batch_size} "
        "--workers={resources.workers} --threads {threads} 2> {log:q}"
