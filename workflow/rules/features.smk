rule feature_store:
    input:
        IMAGES,
    output:
        f"{FEATURES}/zarr.json",
    log:
        f"{LOGS}/feature_store/{{dataset}}/{{trunk}}/{{split}}.log",
    benchmark:
        f"{BENCHMARKS}/feature_store/{{dataset}}/{{trunk}}/{{split}}.tsv"
    params:
        store=subpath(output[0], parent=True),
        settings=network_settings,
        weights=trunk_weights,
        code=code("features", "write_feature_store"),
    shell:
        "cdul feature-store --images {input:q} --split {wildcards.split} "
        "--settings {params.settings:q} --output {params.store:q} 2> {log:q}"


rule features:
    input:
        shard_manifest,
    output:
        shard=f"{FEATURES}/c/{{shard}}/0/0",
        table=FEATURE_TABLE,
    log:
        f"{LOGS}/features/{{dataset}}/{{trunk}}/{{split}}/{{shard}}.log",
    benchmark:
        f"{BENCHMARKS}/features/{{dataset}}/{{trunk}}/{{split}}/{{shard}}.tsv"
    group:
        submission("features")
    threads: 8
    resources:
        gpu=gpus,
        device=RUNTIME.device,
        engine=RUNTIME.engine,
        workers=RUNTIME.workers,
    params:
        store=subpath(output.shard, ancestor=4),
        settings=network_settings,
        weights=trunk_weights,
        max_pixels=dataset_key("max_pixels"),
        code=code("features", "make_features"),
    shell:
        "cdul features --manifest {input:q} --store {params.store:q} --table {output.table:q} "
        "--settings {params.settings:q} --max-pixels {params.max_pixels} "
        "--device {resources.device:q} --gpus {resources.gpu} --engine {resources.engine} "
        "--workers={resources.workers} --threads {threads} 2> {log:q}"
