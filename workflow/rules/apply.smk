# Not part of `all`: `cdul run apply`.
rule apply_shard:
    input:
        # A new manifest alone does not score a shard again; `params.images` does.
        images=ancient(IMAGES),
        manifest=shard_manifest,
        model=applied_model,
    output:
        APPLIED,
    log:
        f"{LOGS}/apply/{{dataset}}/{{classifier}}/{{split}}/{{shard}}.log",
    benchmark:
        f"{BENCHMARKS}/apply/{{dataset}}/{{classifier}}/{{split}}/{{shard}}.tsv"
    group:
        submission("apply_shard")
    threads: 8
    resources:
        gpu=gpus,
        device=RUNTIME.device,
        engine=RUNTIME.engine,
        workers=RUNTIME.workers,
    params:
        folder=lambda wildcards, input: str(Path(input.model[0]).parent),
        # The shard's manifest keeps the rows of images that are no longer in the data set.
        images=shard_images,
        max_pixels=dataset_key("max_pixels"),
        code=code("predict", "predict_images"),
    shell:
        "cdul predict --model {params.folder:q} --images {input.images:q} --manifest {input.manifest:q} "
        "--max-pixels {params.max_pixels} "
        "--device {resources.device:q} --gpus {resources.gpu} --engine {resources.engine} "
        "--workers={resources.workers} --threads {threads} --output {output:q} 2> {log:q}"


rule applied:
    input:
        images=IMAGES,
        parts=lambda wildcards: expand(
            APPLIED, shard=shards(wildcards), allow_missing=True
        ),
    output:
        COUNTS,
    log:
        f"{LOGS}/applied/{{dataset}}/{{classifier}}/{{split}}.log",
    benchmark:
        f"{BENCHMARKS}/applied/{{dataset}}/{{classifier}}/{{split}}.tsv"
    params:
        folder=lambda wildcards, output: str(Path(output[0]).with_suffix("")),
        code=code("applied", "count_applied"),
    shell:
        "cdul applied --parts {params.folder:q} --images {input.images:q} "
        "--split {wildcards.split} --output {output:q} 2> {log:q}"


rule apply:
    input:
        applied_parts,
