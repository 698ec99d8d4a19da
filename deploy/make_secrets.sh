#!/usr/bin/env bash
# Passwords and keys for compose.yaml, made at random in deploy/secrets; what is there already stays.
set -euo pipefail

folder=${1:-"$(dirname "$0")/secrets"}
mkdir -p "$folder"
chmod 700 "$folder" # nobody else comes in; the files themselves are read by the containers' own users
cd "$folder"

random() {
  head -c "$1" /dev/urandom | od -An -tx1 | tr -d ' \n'
}

keep() { # NAME: what comes on stdin, unless there is such a file
  if [ ! -e "$1" ]; then
    cat > "$1.new"
    chmod 644 "$1.new"
    mv "$1.new" "$1"
    echo "made $1"
  else
    cat > /dev/null
  fi
}

random 24 | keep postgres_password
keep pg_service.conf << EOF
[mlflow]
user=mlflow
password=$(cat postgres_password)
EOF
random 32 | keep ray_token
keep aws_credentials << EOF
[default]
aws_access_key_id=$(random 10)
aws_secret_access_key=$(random 20)
EOF
key=$(sed -n 's/^aws_access_key_id=//p' aws_credentials)
secret=$(sed -n 's/^aws_secret_access_key=//p' aws_credentials)
keep s3_identities << EOF
{"identities": [{
  "name": "onestage",
  "credentials": [{"accessKey": "$key", "secretKey": "$secret"}],
  "actions": ["Admin", "Read", "List", "Tagging", "Write"]
}]}
EOF
