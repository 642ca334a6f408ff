rule store:
    input:
        images=IMAGES,
        text=TEXT,
    output:
        f"{EMBEDDINGS}/zarr.json",
    log:
        f"{LOGS}/store/{{dataset}}/{{encoder}}/{{split}}.log",
    benchmark:
        f"{BENCHMARKS}/store/{{dataset}}/{{encoder}}/{{split}}.tsv"
    params:
        store=subpath(output[0], parent=True),
        code=code("similarity", "write_store"),
    shell:
        "cdul store --images {input.images:q} --split {wildcards.split} --text {input.text:q} "
        "--output {params.store:q} 2> {log:q}"


rule similarity:
    input:
        images=IMAGES,
        text=TEXT,
        store=f"{EMBEDDINGS}/zarr.json",
        shards=encoded(f"{EMBEDDINGS}/c/{{shard}}/0/0"),
        tables=encoded(ENCODED),
    output:
        directory(SIMILARITY),
    log:
        f"{LOGS}/similarity/{{dataset}}/{{encoder}}/{{split}}.log",
    benchmark:
        f"{BENCHMARKS}/similarity/{{dataset}}/{{encoder}}/{{split}}.tsv"
    params:
        store=subpath(input.store, parent=True),
        tables=lambda wildcards, input: [f"--table={table}" for table in input.tables],
        max_failed_share=dataset_key("max_failed_share"),
        code=code("similarity", "make_similarity"),
    shell:
        "cdul similarity --store {params.store:q} --text {input.text:q} --images {input.images:q} "
        "--split {wildcards.split} {params.tables:q} "
        "--max-failed-share {params.max_failed_share} --output {output:q} 2> {log:q}"
