// A caller of lossd: node client.js ADDRESS JOB FOLDER, with tensors in files of the folder.
const fs = require("fs");
const path = require("path");
const { grpc, UNLIMITED, field, integer, unknown, oddTensor, v1, rpc } = require("./contract.js");

const [address, job, folder] = process.argv.slice(2);
const client = new v1.LossService(address, grpc.credentials.createInsecure(), UNLIMITED);
const read = (name) => fs.readFileSync(path.join(folder, name));

function tensor(name, dtype) {
  return { dtype, shape: JSON.parse(read(`${name}.json`)), inline: read(`${name}.bin`) };
}

function request() {
  const inputs = tensor("inputs", "DATA_TYPE_FLOAT32");
  const targets = tensor("targets", "DATA_TYPE_INT64");
  return { focal: {}, items: [{ focal: { inputs, targets } }], gradients: ["inputs"] };
}

function keep(error, answer) {
  if (error) throw error;
  const [result] = answer.results;
  fs.writeFileSync(path.join(folder, "loss.out"), result.loss.inline);
  fs.writeFileSync(path.join(folder, "gradient.out"), result.gradients[0].tensors[0].inline);
}

const jobs = {
  plain: () => client.ComputeLoss(request(), keep),

  // The same message in an order and in parts of its own: protobuf merges them.
  odd: () => {
    const [{ focal }] = request().items;
    const inputs = field(1, oddTensor(1, 1, focal.inputs.shape, focal.inputs.inline));
    const targets = field(1, oddTensor(2, 8, focal.targets.shape, focal.targets.inline));
    const bytes = Buffer.concat([field(7, Buffer.from("inputs")), unknown, field(6, targets, inputs), field(1)]);
    const { path: method, responseDeserialize } = v1.LossService.service.ComputeLoss;
    client.makeUnaryRequest(method, (same) => same, responseDeserialize, bytes, keep);
  },

  // The same message in chunks of any length, and the answer put together.
  chunks: () => {
    const { requestSerialize, responseDeserialize } = v1.LossService.service.ComputeLoss;
    const bytes = requestSerialize(request());
    const call = client.ComputeLossInChunks();
    const parts = [];
    call.on("data", ({ data }) => parts.push(data));
    call.on("end", () => keep(null, responseDeserialize(Buffer.concat(parts))));
    for (let at = 0; at < bytes.length; at += 3000000) {
      call.write({ message_bytes: at ? 0 : bytes.length, data: bytes.subarray(at, at + 3000000) });
    }
    call.end();
  },

  refused: () => {
    client.ComputeLoss(request(), (error) => {
      const [details] = error.metadata.get("grpc-status-details-bin");
      const found = rpc.Status.deserialize(details).details.map((detail) => {
        const kind = detail.type_url.split(".").pop();
        return [kind, rpc[kind].deserialize(detail.value)];
      });
      console.log(JSON.stringify({ code: error.code, message: error.details, ...Object.fromEntries(found) }));
    });
  },

  // Everything is sent before anything is read; the third is refused.
  stream: () => {
    const call = client.ComputeLossStream();
    call.on("data", ({ id, response, error }) => {
      const value = response && response.results[0].gradients[0].tensors[0].inline.toString("base64");
      console.log(JSON.stringify({ id, value, reason: error && error.reason }));
    });
    for (let id = 1; id <= 8; id++) {
      const one = request();
      one.focal.gamma = id === 3 ? -1 : id;
      call.write({ id, request: one });
    }
    call.end();
  },
};

jobs[job]();
