import argparse,sys,tempfile,json
from dataclasses import asdict
from pathlib import Path
from checkpoint_trial import Trial, CONTENDERS
from ranks import Ranks
from llama_dist.config import RunConfig, build_config
def run_of(world, quick, zero=1):
    model={"vocab_size":32000,"hidden_size":768,"intermediate_size":2048,"num_hidden_layers":12,"num_attention_heads":12,"num_key_value_heads":12,"max_position_embeddings":1024,"tie_word_embeddings":True}
    if quick: model|={"vocab_size":512,"hidden_size":192,"intermediate_size":512,"num_hidden_layers":2}
    return build_config(RunConfig,{"name":"b","model":model,"parallel":{"zero":zero,"micro_batch":1,"dp":world},"data":{"tokenizer":"-","train":[{"shards":"-"}],"seq_len":32 if quick else 256},"optim":{"lr":1e-4},"train":{"steps":1,"global_batch":world,"device":"cpu"}},where="b")
if __name__=="__main__":
    for world in map(int,sys.argv[1].split(",")):
        for name in CONTENDERS:
            if len(sys.argv)>3 and not any(w in name for w in sys.argv[3].split("/")): continue
            with tempfile.TemporaryDirectory(dir="/tmp/work/ck") as f:
                with Ranks(world,Trial,run_of(world,sys.argv[2]=="quick"),name,f) as ranks:
                    for r in ranks.call("measure",3,2,True):
                        print(world,name,{k:([round(x,3) for x in v] if isinstance(v,list) else v) for k,v in asdict(r).items()},flush=True)
