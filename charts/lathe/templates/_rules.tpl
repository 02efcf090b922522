{{/* The operator's rights in every namespace that it looks after. Each verb is one that it calls; children are removed by
     garbage collection, and without blockOwnerDeletion no right on finalizers is needed. */}}
{{- define "lathe.namespaceRules" -}}
# What users ask for.
- apiGroups: [lathe.dev]
  resources: [finetunejobs, inferenceservices]
  verbs: [get, list, watch]
# Models are read too; that of a finished job is made, and its lineage corrected when its gates pass after all.
- apiGroups: [lathe.dev]
  resources: [models]
  verbs: [get, list, watch, create, patch]
# What came of it.
- apiGroups: [lathe.dev]
  resources: [models/status, finetunejobs/status, inferenceservices/status]
  verbs: [patch]
# Inspection, dataset checks and training run as Jobs; suspend is a patch, an expiry or a replacement a deletion.
- apiGroups: [batch]
  resources: [jobs]
  verbs: [get, list, watch, create, patch, delete]
# Serving runs as a Deployment; that of a revision that is tried goes when it has held its gates, or has not.
- apiGroups: [apps]
  resources: [deployments]
  verbs: [get, list, watch, create, patch, delete]
# Why a pod does not run, its address for the control channel, its last words.
- apiGroups: [""]
  resources: [pods]
  verbs: [list, watch]
# The contract of a pod, where no ConfigMap of somebody else has its name; that of an earlier revision goes when no pod reads it
# any more.
- apiGroups: [""]
  resources: [configmaps]
  verbs: [get, list, watch, create, patch, delete]
# The endpoint of a service.
- apiGroups: [""]
  resources: [services]
  verbs: [get, list, watch, create, patch]
# The artefact volume, made on first need and never changed or deleted; which volumes one node alone can mount.
- apiGroups: [""]
  resources: [persistentvolumeclaims]
  verbs: [get, list, watch, create]
# Replicas go one by one when nodes are drained.
- apiGroups: [policy]
  resources: [poddisruptionbudgets]
  verbs: [get, list, watch, create, patch]
# Who may talk to the pods.
- apiGroups: [networking.k8s.io]
  resources: [networkpolicies]
  verbs: [get, list, watch, create, patch]
# What happened, for people (an event that repeats is counted in the first); why a node cannot start a pod.
- apiGroups: [events.k8s.io]
  resources: [events]
  verbs: [list, create, patch]
{{- end }}
{{/* Its rights on things without a namespace. */}}
{{- define "lathe.clusterRules" -}}
# What models can run on.
- apiGroups: [lathe.dev]
  resources: [acceleratorprofiles]
  verbs: [list, watch]
{{- if not .Values.namespaces }}
# The embedded catalogue, applied at start. An operator of some namespaces must not decide for the others.
- apiGroups: [lathe.dev]
  resources: [acceleratorprofiles]
  verbs: [create, patch]
{{- end }}
{{- if .Values.readNodes }}
# How many accelerators there are.
- apiGroups: [""]
  resources: [nodes]
  verbs: [list]
{{- end }}
{{- end }}
{{/* The gateway's rights in every namespace whose services it reaches: it writes nothing. */}}
{{- define "lathe.gatewayRules" -}}
# Which services there are, and which model ids answer.
- apiGroups: [lathe.dev]
  resources: [inferenceservices]
  verbs: [list, watch]
# How jobs go, for the page.
- apiGroups: [lathe.dev]
  resources: [finetunejobs]
  verbs: [list, watch]
# Which of their pods are ready.
- apiGroups: [discovery.k8s.io]
  resources: [endpointslices]
  verbs: [list, watch]
{{- end }}
{{/* And in its own, where it writes one object. */}}
{{- define "lathe.gatewayUsageRules" -}}
# What keys used, of all its replicas together.
- apiGroups: [""]
  resources: [configmaps]
  resourceNames: [lathe-gateway-usage]
  verbs: [get, update]
# It is made on first need; a right to make has no names.
- apiGroups: [""]
  resources: [configmaps]
  verbs: [create]
# How many replicas share the limits.
- apiGroups: [discovery.k8s.io]
  resources: [endpointslices]
  verbs: [list]
{{- end }}
